"""The table of an index: its settings, its columns, and records as rows."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rematch.data.clips import FRAMES
from rematch.errors import DataError
from rematch.search.columns import CORPUS, WORDS

_METADATA_KEY = b"rematch"


@dataclass(frozen=True)
class IndexSettings:
    """What is stored with the table, and decides its vectors.

    Attributes:
        model: Name or directory to load the model by.
        fingerprint: Fingerprint of the model.
        dimensions: Number of dimensions of each vector.
        tokens: K, the number of token vectors per document; 0 if they are not stored.
        document_instructions: Whether documents were encoded with their instructions.
        corpus: Name of the corpus that the index was made of.
        instructions: Query instructions by kind (:mod:`rematch.data.instructions`); those that
            are missing, as in an index of an earlier version, are the default ones.
        frames: How many frames stand for a video.
        store_pictures: Whether pictures of files and pages are stored too.
    """

    model: str
    fingerprint: str
    dimensions: int
    tokens: int
    document_instructions: bool
    corpus: str
    instructions: dict[str, str] = field(default_factory=dict)
    frames: int = FRAMES
    store_pictures: bool = False


def table_schema(settings: IndexSettings, width: int) -> pa.Schema:
    """Columns of an empty index, with its settings.

    Args:
        settings: The settings.
        width: D, the width of a token vector.
    """
    vector = pa.list_(pa.float32(), settings.dimensions)
    fields = [pa.field("id", pa.string(), nullable=False), pa.field("vector", vector)]
    if settings.tokens:
        fields.append(pa.field("tokens", pa.list_(pa.list_(pa.float16(), width))))
    fields += [
        pa.field("text", pa.string()),
        pa.field("path", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("content_hash", pa.string()),
        pa.field("stamp", pa.int64()),
        pa.field(WORDS, pa.string()),
        pa.field(CORPUS, pa.string()),
    ]
    return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(asdict(settings))})


def settings_of(schema: pa.Schema, uri: str) -> IndexSettings:
    """The settings stored in a table's schema.

    Raises:
        DataError: If there are none.
    """
    content = (schema.metadata or {}).get(_METADATA_KEY)
    if content is None:
        raise DataError(
            f"{uri}: its table was not written by `rematch index`. Choose another directory."
        )
    try:
        return IndexSettings(**json.loads(content))
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            f"{uri}: was written by another version of rematch, or is damaged. Index the corpus "
            "again."
        ) from None


def as_table(records: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Records as rows of a table, with null where a record lacks a column.

    Args:
        records: Rows as dictionaries; ``vector`` is (D,), ``tokens`` (K, D).
        schema: The table's schema.
    """
    columns = [_column(field, [record.get(field.name) for record in records]) for field in schema]
    return pa.table(columns, schema=schema)


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if field.name == "vector":
        flat = np.concatenate(values).astype(np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
    if field.name == "tokens":
        tokens = np.stack(values).astype(np.float16)  # (N, K, D)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), tokens.shape[2])
        offsets = pa.array(np.arange(len(tokens) + 1, dtype=np.int32) * tokens.shape[1])
        return pa.ListArray.from_arrays(offsets, vectors)
    return pa.array(values, field.type)
