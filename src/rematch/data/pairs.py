"""Own training data: JSONL or parquet with ``query``, ``positive`` and, if there are, ``negative``
columns.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rematch.data.images import EXTENSIONS
from rematch.data.schema import Item, Triplet
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS


def read_triplets(path: Path | str, allow_missing: bool = False) -> list[Triplet]:
    """Training samples from a file.

    Each column holds a string, the path of a picture (relative to the file), or ``{"text": …,
    "image": …}``.

    Args:
        path: The file.
        allow_missing: Let pictures be missing; whoever opens one then gets an ImageError.

    Raises:
        DataError: If the file is missing, a line does not parse, a column is missing or empty, or
            a picture is not there; the message names the file and the row.
    """
    path = Path(path)
    triplets = []
    for row, record in rows(path):
        if not isinstance(record, dict) or not {"query", "positive"} <= record.keys():
            seen = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}:{row}: needs the columns 'query' and 'positive' (and may have "
                f"'negative'); has {seen}."
            )
        items = {
            name: item(record[name], path, row, name, allow_missing)
            for name in ("query", "positive", "negative")
            if record.get(name)
        }
        if missing := {"query", "positive"} - items.keys():
            raise DataError(
                f"{path}:{row}: {missing.pop()!r} is empty. Fill it in or delete the row."
            )
        triplets.append(Triplet(items["query"], items["positive"], items.get("negative")))
    if not triplets:
        raise DataError(f"{path}: holds no samples.")
    return triplets


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of every row of a .jsonl or .parquet file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read as parquet ({error}).") from None
        yield from enumerate(table.to_pylist(), 1)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: is neither .jsonl nor .parquet. Convert it to one of them.")
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield row, json.loads(line)
            except UnicodeDecodeError:
                raise DataError(f"{path}:{row}: not UTF-8. Convert the file.") from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{row}: not valid JSON ({error.msg}, column {error.colno}). Fix the "
                    "line."
                ) from None


def item(value: Any, path: Path, row: int, column: str, allow_missing: bool = False) -> Item:
    """A cell as an item; picture paths are looked up beside the data file.

    A document with a picture gets the instruction that Picto's and MMEB's picture targets have.
    """
    if isinstance(value, str):
        value = {"image": value} if value.lower().endswith(EXTENSIONS) else {"text": value}
    known = isinstance(value, dict) and value.keys() <= {"text", "image"}
    text, names = (value.get("text") or "", value.get("image") or []) if known else ("", [])
    names = names if isinstance(names, list) else [names]
    typed = isinstance(text, str) and all(isinstance(name, str) for name in names)
    if not typed or not (text.strip() or names):
        raise DataError(
            f"{path}:{row}: {column} = {value!r} is neither text, a picture's path, nor {{'text': "
            f"…, 'image': …}} with something in it."
        )
    images = [path.parent / name for name in names]
    for image in images:
        if not allow_missing and not image.is_file():
            raise DataError(
                f"{path}:{row}: {column} names the picture {image}, which is not there."
            )
    instruction = DOCUMENT_INSTRUCTIONS["image"] if images and column != "query" else ""
    if instruction and text:
        instruction += " "
    return Item(text, images if len(images) > 1 else images[0] if images else None, instruction)
