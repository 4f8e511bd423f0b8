"""Rows of JSONL and parquet files, and the items in their cells."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from rematch.data.images import EXTENSIONS
from rematch.data.schema import Item
from rematch.errors import DataError, first_line, shortened
from rematch.prompts import DOCUMENT_INSTRUCTIONS

LONGEST_LINE = 64 << 20  # bytes, of a JSONL file
_BATCH = 64  # rows of a parquet file, which may hold pictures


def load_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the row number, from 1, and the content of every row of a .jsonl or .parquet file.

    Raises:
        DataError: If the file is missing or has another format, or a row does not parse.
    """
    for row, content in load_lenient_rows(path):
        if isinstance(content, DataError):
            raise content
        yield row, content


def load_lenient_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """:func:`load_rows`, with a DataError as the content of a row that does not parse.

    Raises:
        DataError: If the file is missing or broken, or has another format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _json_rows(path)
    else:
        raise DataError(f"{path}: is neither .jsonl nor .parquet. Convert it to one of them.")


def _parquet_batches(path: Path) -> Iterator[Any]:
    """Record batches; memory holds one of them and what a page of each column takes."""
    import pyarrow.parquet

    try:
        # with pre_buffer, which is the default, memory grows to the size of the file
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            yield from file.iter_batches(_BATCH)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)}).") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    row = 0
    for batch in _parquet_batches(path):
        for position in range(len(batch)):
            row += 1
            try:
                content: Any = {
                    name: column[position].as_py()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
            except Exception as error:
                content = DataError(f"{path}:{row}: cannot be read ({first_line(error)}).")
            yield row, content


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    with file:
        for row in count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                yield row, DataError(f"{path}:{row}: longer than {LONGEST_LINE:,} bytes. Cut it.")
            elif line.strip():
                yield row, _parsed_line(line, f"{path}:{row}")


def _parsed_line(line: bytes, place: str) -> Any:
    """The content of a line, or a DataError."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return DataError(f"{place}: not UTF-8. Convert the file.")
    except json.JSONDecodeError as error:
        return DataError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}). Fix the line."
        )
    except Exception as error:  # nested too deeply, or a number of thousands of digits
        return DataError(f"{place}: cannot be read as JSON ({first_line(error)}). Fix the line.")


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
            f"{path}:{row}: {column} = {shortened(value)} is neither text, the path of a picture, "
            "nor {'text': …, 'image': …} with content in it."
        )
    if not is_text(text) or not all(map(is_text, names)):
        raise DataError(
            f"{path}:{row}: {column} = {shortened(value)} holds null characters or halves of "
            "surrogate pairs, which are not text. Remove them."
        )
    images = [path.parent / name for name in names]
    for image in images:
        if not allow_missing and not is_file(image):
            raise DataError(
                f"{path}:{row}: {column} names the picture {image}, which is not there."
            )
    instruction = DOCUMENT_INSTRUCTIONS["image"] if images and column != "query" else ""
    if instruction and text:
        instruction += " "
    if len(images) > 1:
        return Item(text, images, instruction)
    return Item(text, images[0] if images else None, instruction)


def is_text(value: Any) -> bool:
    r"""Whether a value is a text that can be tokenized and written to files.

    >>> is_text("día"), is_text("\ud83d"), is_text("\0"), is_text(7)
    (True, False, False, False)
    """
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether there is a regular file; not if nobody may look, or its name is too long."""
    try:
        return path.is_file()
    except OSError:
        return False
