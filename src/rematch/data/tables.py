"""Rows of a data set in the hub's form, from a folder or from the hub, with ``datasets``.

Rows are mapped into memory: a corpus of pictures does not have to fit.
"""

from pathlib import Path
from typing import Any

from rematch.data.images import EncodedPicture
from rematch.errors import DataError, ImageError

Rows = Any  # datasets.Dataset, which has no types


def load_table(source: Path | str, config: str = "", split: str = "test") -> Rows:
    """Load a configuration of a data set.

    In a folder its files are ``CONFIG/SPLIT-*`` (parquet or JSONL), else ``CONFIG/*``, else
    ``CONFIG.jsonl`` or ``.parquet``; else what the folder's README.md says, as on the hub.

    Args:
        source: A folder, or the name of a repository on the hub.
        config: Name of the configuration; empty for the only one.
        split: Name of the split.

    Raises:
        DataError: If there is no such configuration, or it cannot be read.
    """
    import datasets

    place = f"{source}, {config or 'rows'}"
    had_progress_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        files = _files(source, config, split) if isinstance(source, Path) else []
        if files:
            kind = "parquet" if files[0].suffix == ".parquet" else "json"
            names = [str(file) for file in files if file.suffix == files[0].suffix]
            rows: Rows = datasets.load_dataset(kind, data_files=names, split="train")
        else:
            rows = datasets.load_dataset(str(source), config or None, split=split)
    except Exception as error:  # the library raises what its readers and the network raise
        message = str(error).strip().splitlines()
        reason = message[0] if message else type(error).__name__
        remedy = (
            "Check the folder, or download the set again"
            if isinstance(source, Path)
            else "Download the repository on another machine and give its folder with --data"
        )
        raise DataError(f"{place}: cannot be loaded ({reason}). {remedy}.") from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()
    if isinstance(rows.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows


def _files(folder: Path, config: str, split: str) -> list[Path]:
    for prefix in (f"{config}/", f"{config}/data/") if config else ("", "data/"):
        for name in (f"{split}-*", f"{split}.*") + (("*",) if config else ()):
            for suffix in (".parquet", ".jsonl"):
                files = [
                    file
                    for file in sorted(folder.glob(prefix + name))
                    if file.suffix == suffix and not file.name.startswith("._")
                ]
                if files:
                    return files
    alone = [folder / f"{config}{suffix}" for suffix in (".parquet", ".jsonl")]
    return [file for file in alone if config and file.is_file()]


def are_paths(rows: Rows, column: str) -> bool:
    """Whether a column holds texts, such as paths of pictures, and not pictures."""
    return str(getattr(rows.features[column], "dtype", "")) in ("string", "large_string")


def require_columns(rows: Rows, columns: tuple[str, ...], place: str) -> None:
    """Raise a DataError if a table lacks a column."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{place}: has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
            "Download the set again."
        )


class TablePicture(EncodedPicture):
    """A picture in a row of a table, read when it is needed.

    Args:
        name: Name of the picture, for errors.
        rows: The table; its column ``image`` has the picture's bytes, or its path.
        row: Number of the row.
    """

    def __init__(self, name: str, rows: Rows, row: int) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "row", row)

    rows: Rows
    row: int

    def __repr__(self) -> str:
        return f"TablePicture({self.name!r})"

    def read_bytes(self) -> bytes:
        """Return the content of the picture's file.

        Raises:
            ImageError: If the row has no picture, or its file cannot be read.
        """
        cell = self.rows[self.row]["image"]
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            try:
                return Path(cell).read_bytes()
            except OSError as error:
                raise ImageError(f"{self.name}: {cell} ({error.strerror}).") from None
        if not isinstance(cell, bytes):
            raise ImageError(f"{self.name}: the row has no picture. Download the set again.")
        return cell
