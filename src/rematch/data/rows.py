"""Rows of JSONL and parquet files, and the items in their cells."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rematch.data.images import EXTENSIONS
from rematch.data.schema import Item
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS


def load_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the row number, from 1, and the content of every row of a .jsonl or .parquet file.

    Raises:
        DataError: If the file is missing or has another format, or a row does not parse.
    """
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


def parse_item(value: Any, path: Path, row: int, column: str, allow_missing: bool = False) -> Item:
    """Make an item of a cell.

    A document with a picture gets the instruction that Picto's and MMEB's picture targets have.

    Args:
        value: Text, the path of a picture relative to the data file, or ``{"text": …, "image":
            …}`` with one or several pictures.
        path: The data file.
        row: Number of the row, for the error.
        column: Name of the column; ``"query"`` for queries.
        allow_missing: Whether pictures may be missing; opening one later raises an ImageError.

    Raises:
        DataError: If the cell is empty or of another kind, or a picture is missing.
    """
    if isinstance(value, str):
        value = {"image": value} if value.lower().endswith(EXTENSIONS) else {"text": value}
    text: Any = ""
    names: list[Any] = []
    if isinstance(value, dict) and value.keys() <= {"text", "image"}:
        text = value.get("text") or ""
        pictures = value.get("image") or []
        names = pictures if isinstance(pictures, list) else [pictures]
    well_typed = isinstance(text, str) and all(isinstance(name, str) for name in names)
    if not well_typed or not (text.strip() or names):
        raise DataError(
            f"{path}:{row}: {column} = {value!r} is neither text, the path of a picture, nor "
            "{'text': …, 'image': …} with content in it."
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
    if len(images) > 1:
        return Item(text, images, instruction)
    return Item(text, images[0] if images else None, instruction)
