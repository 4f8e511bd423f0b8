"""The place of an index, a local directory or an object store, and errors of writing there."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lancedb

from rematch.errors import DataError

TABLE = "documents"


def exists(uri: str | Path) -> bool:
    """Whether there is an index at this directory or URI."""
    if is_local(str(uri)):
        return (Path(uri) / f"{TABLE}.lance").is_dir()
    return TABLE in lancedb.connect(str(uri)).list_tables().tables


def is_local(uri: str) -> bool:
    """Whether this is a directory of this machine."""
    return "://" not in uri


def is_in(column: str, values: Iterable[str]) -> str:
    """A condition in SQL: the column has one of the values.

    >>> print(is_in("id", ["a", "it's"]))
    id IN ('a', 'it''s')
    """
    literals = ("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({', '.join(literals)})"


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turn LanceDB's errors of writing into a DataError of one line.

    What was committed before stays intact.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = str(error)
        reasons = ("No space left on device", "Read-only file system", "Permission denied")
        reason = next((r for r in reasons if r in text), text.splitlines()[0][:200])
        raise DataError(
            f"{uri}: cannot be written ({reason}). What was written before is intact. Fix the "
            "cause and run the command again."
        ) from error


@contextmanager
def write_lock(uri: str) -> Iterator[None]:
    """Keep other processes from writing to the index; readers are not affected.

    On an object store nothing is locked; rows are merged by id there.

    Raises:
        DataError: If another process is writing, or the directory cannot be written.
    """
    if not is_local(uri):
        yield
        return
    path = Path(uri) / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise DataError(f"{uri}: cannot be written ({error.strerror}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{uri}: another process is writing to it. Wait until it is done."
            ) from None
        yield
