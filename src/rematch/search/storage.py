"""The place of an index, a local directory or an object store, and errors of using it."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import lancedb
import pyarrow as pa

from rematch.errors import DataError, RematchError, StorageError, first_line
from rematch.files import check_replaceable, made_folders, remove, write_failure
from rematch.search.columns import literal

TABLE = "documents"
REPORT = "report.json"
_LOCK = ".lock"
_OBJECT_STORES = ("s3", "gs", "az", "file")
_FRESH_SECONDS = 0.5  # how old the version may be that is read
_PATIENCE_SECONDS = 2.0  # for an index that is being replaced
_SETTLED_SECONDS = 0.2  # in which a replaced index must not change before it is read
_PAUSE_SECONDS = 0.05

Value = TypeVar("Value")


class UnreadableIndexError(StorageError):
    """The index is there no more, or its files cannot be read."""


class MissingIndexError(UnreadableIndexError):
    """There is no index; probably another place was meant."""

    exit_status = 2


def exists(uri: str | Path) -> bool:
    """Whether there is an index at this directory or URI."""
    if is_local(str(uri)):
        return (Path(uri) / f"{TABLE}.lance").is_dir()
    scheme, _, bucket = str(uri).partition("://")
    if scheme not in _OBJECT_STORES or not bucket.strip("/"):
        stores = ", ".join(f"{name}://BUCKET/NAME.idx" for name in _OBJECT_STORES)
        raise DataError(f"{uri}: no index can be there. Give a directory, or one of {stores}.")
    try:
        return TABLE in lancedb.connect(str(uri)).list_tables().tables
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{uri}: cannot be reached ({first_line(error)}). Check its name and your credentials."
        ) from error


def is_local(uri: str) -> bool:
    """Whether this is a directory of this machine."""
    return "://" not in uri


def is_in(column: str, values: Iterable[str]) -> str:
    """A condition in SQL: the column has one of the values.

    >>> print(is_in("id", ["a", "it's"]))
    id IN ('a', 'it''s')
    """
    return f"{column} IN ({', '.join(map(literal, values))})"


def create_table(uri: str, schema: pa.Schema) -> Any:
    """The table of a new index.

    If it cannot be made, nothing of it remains.

    Raises:
        StorageError: If another process has just made it, a file is in the way, or the place
            cannot be written.
    """
    if not is_local(uri):
        with writing(uri):
            return lancedb.connect(uri).create_table(TABLE, schema=schema)
    report = Path(uri) / REPORT
    check_replaceable([report], report, {"corpus", "last_run"})
    with writing(uri), made_folders(Path(uri)), write_lock(uri):
        lock, table = Path(uri) / _LOCK, Path(uri) / f"{TABLE}.lance"
        if os.path.lexists(table):
            raise StorageError(
                f"{uri}: another process has just made an index there. Run the command again to "
                "bring it up to date."
            )
        try:
            return lancedb.connect(uri).create_table(TABLE, schema=schema)
        except BaseException:
            for path in (table, lock):
                with suppress(OSError):
                    remove(path)
            raise


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn whatever LanceDB raises on reading a table into an UnreadableIndexError of one line.

    A RematchError passes.
    """
    try:
        yield
    except (RematchError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise UnreadableIndexError(
            f"{uri}: the index cannot be read ({first_line(error)}). A file of it is missing, "
            "cut off or damaged. Restore it from a copy, or remove the directory and index the "
            "corpus again."
        ) from error


class LiveTable:
    """The table of an index, which other processes may update, compact, replace or restore.

    Args:
        uri: The index's directory or URI.
        version: A version to stay at; by default the table follows the latest one.

    Raises:
        DataError: If there is no index, or no such version.
    """

    def __init__(self, uri: str, version: int | None = None) -> None:
        self.uri = uri
        self._follows = version is None
        self._opening = Lock()
        self._failing_since: float | None = None
        self._connection: Any = None
        if not exists(uri):
            raise _missing(uri)
        self._directory = self._inode()
        self._table = self._open()
        self._opened = time.monotonic()
        if version is not None:
            versions = [v["version"] for v in self._table.list_versions()]
            if version not in versions:
                raise DataError(
                    f"{uri}: has no version {version}; it has {versions[0]} to {versions[-1]}."
                )
            self._table.checkout(version)

    def current(self) -> Any:
        """A table that stays at one version, which was the latest one half a second ago.

        Raises:
            UnreadableIndexError: If the index is there no more.
        """
        with self._opening:
            if self._follows and time.monotonic() - self._opened > _FRESH_SECONDS:
                self._table = self._open_latest()
                self._opened = time.monotonic()
            return self._table

    def read(self, operation: Callable[[], Value]) -> Value:
        """Run an operation that reads from :meth:`current`.

        While its files are missing, which they are when an old version is removed or the index is
        being replaced, the operation is repeated for up to two seconds. After that, further
        operations fail at once until one succeeds.

        Args:
            operation: It raises :class:`UnreadableIndexError` if the index cannot be read.

        Raises:
            UnreadableIndexError: If the index stays unreadable.
        """
        while True:
            try:
                result = operation()
            except UnreadableIndexError:
                self._opened = float("-inf")
                now = time.monotonic()
                if self._failing_since is None:
                    self._failing_since = now
                elif not self._follows or now - self._failing_since > _PATIENCE_SECONDS:
                    raise
                else:
                    time.sleep(_PAUSE_SECONDS)
            else:
                self._failing_since = None
                return result

    def _open_latest(self) -> Any:
        """The latest version; of an index that was replaced, once no more versions turn up.

        A copy that is under way may hold an old version alone, even the first one without a row.
        It is waited for as long as for an index that cannot be read.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        table, directory = self._open(), self._inode()
        is_changing = directory != self._directory or table.version < self._table.version
        while is_changing and time.monotonic() < deadline:
            before = directory, table.version
            time.sleep(_SETTLED_SECONDS)
            table, directory = self._open(), self._inode()
            is_changing = before != (directory, table.version)
        self._directory = directory
        return table

    def _inode(self) -> int | None:
        """Which directory holds the table; None on an object store."""
        if not is_local(self.uri):
            return None
        with reading(self.uri):
            return (Path(self.uri) / f"{TABLE}.lance").stat().st_ino

    def _open(self) -> Any:
        # connecting would make the directory, into which a restored index could not be moved
        if is_local(self.uri) and not exists(self.uri):
            raise _missing(self.uri)
        with reading(self.uri):
            if self._connection is None:
                self._connection = lancedb.connect(self.uri)
            return self._connection.open_table(TABLE)


def _missing(uri: str) -> MissingIndexError:
    return MissingIndexError(
        f"{uri}: no index there. Make one with `rematch index MODEL CORPUS --output {uri}`."
    )


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turn LanceDB's errors of writing into a StorageError of one line.

    What was committed before stays intact.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = write_failure(error) or first_line(error)
        raise StorageError(
            f"{uri}: cannot be written ({reason}). What was written before is intact. Fix the "
            "cause and run the command again."
        ) from error


@contextmanager
def write_lock(uri: str) -> Iterator[None]:
    """Keep other processes from writing to the index; readers are not affected.

    On an object store nothing is locked; rows are merged by id there.

    Raises:
        StorageError: If another process is writing, or the directory cannot be written.
    """
    if not is_local(uri):
        yield
        return
    try:
        lock = os.open(Path(uri) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be written ({error.strerror}).") from None
    with open(lock, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = (file.read(200) or b"").decode(errors="replace").strip()
            raise StorageError(
                f"{uri}: another process is writing to it{f' ({owner})' if owner else ''}. Wait "
                "until it is done."
            ) from None
        with suppress(OSError):  # on a full disk too, an index can be brought up to date
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
