"""Metadata as columns of a LanceDB table, and names that can be columns."""

from unicodedata import category

import pyarrow as pa

from rematch.data.document import Metadata, Value
from rematch.errors import DataError

WORDS = "_words"  # a document's text and the metadata that is text
CORPUS = "_corpus"  # name of the corpus that a document comes from
RESERVED = (
    "id", "vector", "tokens", "text", "path", "image", "content_hash", "stamp", WORDS, CORPUS
)  # fmt: skip
_VALUE_NAMES = {"bool": "a boolean", "double": "a number", "string": "text"}


def new_columns(schema: pa.Schema, metadata: Metadata) -> list[pa.Field]:
    """The columns that a document's metadata needs and the schema lacks.

    Raises:
        DataError: If a name cannot be a column, or a value has another type than its column.
    """
    columns = []
    spellings = {name.casefold(): name for name in schema.names}
    for name, value in metadata.items():
        _check_name(name)
        spelling = spellings.setdefault(name.casefold(), name)
        if spelling != name:
            raise DataError(
                f"metadata {name!r} differs from {spelling!r} only in case. Use one spelling."
            )
        if value is None:
            continue
        value_type = _arrow_type(value)
        if name not in schema.names:
            columns.append(pa.field(name, value_type))
        elif schema.field(name).type != value_type:
            expected = _type_name(schema.field(name).type)
            raise DataError(
                f"metadata {name} = {value!r} is {_type_name(value_type)}, but other documents "
                f"have {expected}. Use one type."
            )
    return columns


def _arrow_type(value: Value) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    return pa.float64() if isinstance(value, float) else pa.string()


def _type_name(arrow_type: pa.DataType) -> str:
    return _VALUE_NAMES.get(str(arrow_type), str(arrow_type))


def _check_name(name: str) -> None:
    if name.casefold() in RESERVED or name.startswith("_"):
        raise DataError(f"metadata {name!r} has a name that the index reserves. Rename it.")
    if not name.strip():
        raise DataError(f"metadata {name!r} has an empty name. Give it one.")
    has_control_characters = any(category(character) in ("Cc", "Cs") for character in name)
    if name == "*" or "." in name or "`" in name or has_control_characters:
        raise DataError(
            f"metadata {name!r} cannot be a column: '*' is not a name, and dots, backticks, "
            "control characters and lone surrogates are not allowed in one. Rename it."
        )


def literal(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"
