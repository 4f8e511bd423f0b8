"""Where an index lies: a directory of this machine, or an object store; and LanceDB's errors of
writing there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lancedb

from rematch.errors import DataError

TABLE = "documents"


def exists(uri: str | Path) -> bool:
    """Whether an index lies there."""
    if is_local(str(uri)):
        return (Path(uri) / f"{TABLE}.lance").is_dir()
    return TABLE in lancedb.connect(str(uri)).table_names()


def is_local(uri: str) -> bool:
    """Whether it is a directory of this machine."""
    return "://" not in uri


def quoted(text: str) -> str:
    """A string literal in SQL.

    >>> print(quoted("it's"))
    'it''s'
    """
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """LanceDB's errors of writing, as one line; what was committed before stays as it is."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = str(error)
        reason = next(
            (
                r
                for r in ("No space left on device", "Read-only file system", "Permission denied")
                if r in text
            ),
            "",
        )
        raise DataError(
            f"{uri}: cannot be written ({reason or text.splitlines()[0][:200]}). What is in it "
            "already is whole; mend that and start again."
        ) from error
