"""Reading and writing files, so that nothing is half-written, waited for, or removed by mistake.

- A file is written under a temporary name and renamed when it is complete.
- A directory is filled as ``NAME.partial`` and renamed when it is complete. A marker inside says
  that ReMatch made it, and is locked while a process uses it. Without the marker nothing of that
  name is touched.
- Only regular files up to a size are read: no pipe, no device, no sparse giant.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any

import yaml

from rematch.errors import DataError, RematchError, StorageError, first_line

_LARGEST_TEXT = 1 << 32
_LARGEST_YAML = 1 << 20
MARKER = ".rematch-partial"
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
# how libraries that write in C++ or Rust say that the disk is full, or a file may not grow
_WRITE_FAILURES = {
    "No space left on device": "No space left on device",
    "database or disk is full": "No space left on device",
    "disk I/O error": "disk I/O error",
    "Read-only file system": "Read-only file system",
    "readonly database": "Read-only file system",
    "Permission denied": "Permission denied",
    "File too large": "File too large",
    "quota exceeded": "Disk quota exceeded",
    "PytorchStreamWriter": "the file could not be written to its end",
    "inline_container.cc": "the file could not be written to its end",
    "embedded null": "a name cannot contain a null character",
}


# ---- files --------------------------------------------------------------------------------------


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: The file, or a link to it.
        limit: Number of bytes from which it is refused.

    Raises:
        OSError: If it cannot be opened or read.
        DataError: If it is a folder, a pipe, a socket or a device, or larger than the limit.
    """
    regular_status(path, limit)  # opening a device may already do something
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()), limit)
        content = file.read(limit + 1)
    if len(content) > limit:  # it has grown, or is made up by the kernel
        raise DataError(f"{path}: is larger than {limit:,} bytes. Make it smaller.")
    return content


def regular_status(path: Path, limit: int) -> os.stat_result:
    """The status of a regular file; arguments and errors as for :func:`read_regular`."""
    status = path.stat()
    _check_regular(path, status, limit)
    return status


def _check_regular(path: Path, status: os.stat_result, limit: int) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind:
        raise DataError(f"{path}: is {kind}; only regular files are read. Remove it.")
    if status.st_size > limit:
        raise DataError(
            f"{path}: has {status.st_size:,} bytes; at most {limit:,} are read. Make it smaller."
        )


def read_text(path: Path, largest: int = _LARGEST_TEXT) -> str:
    """Read a file of text.

    Args:
        path: The file.
        largest: Number of bytes that it may have.

    Raises:
        DataError: If it is not a regular file, cannot be read, is larger, or is not UTF-8.
    """
    try:
        content = read_regular(path, largest)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}. Convert the file.") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: As for :func:`read_text`, or if it is not valid JSON.
    """
    try:
        return json.loads(read_text(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # nested too deeply, or too many digits
        raise DataError(f"{path}: cannot be read as JSON ({first_line(error)}).") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    Raises:
        DataError: As for :func:`read_text`, or if it is not valid YAML.
    """
    text = read_text(path, _LARGEST_YAML)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid YAML ({error}).") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        ValueError: If it is not valid; the message is one line.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # of dates and numbers that only look like some, and deep nesting
        raise ValueError(first_line(error)) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` for the block to write, which then takes its place.

    If the block fails, the new file is removed and ``path`` is as it was.

    Raises:
        StorageError: If it cannot be written.
    """
    temporary = path.with_name(f".rematch-{token_hex(8)}{path.suffix[:16]}")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON.

    Raises:
        ValueError: If it contains NaN or infinity.
        StorageError: If it cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, creating the folder if needed.

    Raises:
        StorageError: If it cannot be written.
    """
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failure to write, from whatever library, into a StorageError of one line.

    Other errors pass.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_be_written(path, error.strerror or first_line(error)) from error
    except Exception as error:
        reason = write_failure(error)
        if reason is None or isinstance(error, RematchError):
            raise
        raise _cannot_be_written(path, reason) from error


def write_failure(error: Exception) -> str | None:
    """Why the system did not let a library write, if that is what an error says."""
    text = str(error)
    return next((reason for sign, reason in _WRITE_FAILURES.items() if sign in text), None)


def _cannot_be_written(path: Path | str, reason: str) -> StorageError:
    return StorageError(
        f"{path}: cannot be written ({reason}). Fix the cause, or choose another place, and run "
        "the command again."
    )


# ---- directories --------------------------------------------------------------------------------


def check_writable(directory: Path) -> None:
    """Check, before hours of work, that a directory can be made and files written there.

    Nothing of it remains.

    Raises:
        StorageError: If not.
    """
    missing: list[Path] = []
    probe = directory / f".rematch-{token_hex(8)}"
    try:
        with writing(directory):
            missing += [path for path in (directory, *directory.parents) if not path.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        remove_empty(missing)


def check_replaceable(files: Sequence[Path], record: Path, keys: set[str]) -> None:
    """Refuse to replace files that no earlier run has written.

    Args:
        files: The files that are about to be written.
        record: That of them which tells an earlier run's files from the user's: JSON with ...
        keys: ... these keys.

    Raises:
        StorageError: If one of the files exists, and the record is not that of an earlier run.
    """
    existing = next((file for file in files if os.path.lexists(file)), None)
    if existing is None:
        return
    content = None
    with suppress(OSError, ValueError, RecursionError, DataError):
        content = json.loads(read_regular(record, 1 << 30))
    if not isinstance(content, dict) or not keys <= content.keys():
        raise StorageError(
            f"{existing}: exists already, and {record.name} beside it is not that of an earlier "
            "run, so it is not replaced. Choose another directory, or move the file away."
        )


@contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; those that were missing go again if the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(missing)
        raise


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


class PartialDirectory:
    """``OUTPUT.partial``, where a run keeps its files until they are complete.

    Use it in a ``with`` statement, which locks it; the end of the process unlocks it in any case.

    Args:
        output: What the run will write.

    Attributes:
        path: The directory.
        holds_earlier_files: Whether it holds files of a run before this one.

    Raises:
        StorageError: On entering, if something of this name is not ReMatch's, another process
            uses it, or it cannot be made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        if output.name in ("", ".."):
            output = output.resolve()
        self.path = output.with_name(output.name + ".partial")
        self.holds_earlier_files = False
        self._lock: int | None = None
        self._made: list[Path] = []  # folders that were missing, innermost first

    def __enter__(self) -> "PartialDirectory":
        self.check()
        try:
            with writing(self.path):
                parents = (self.path, *self.path.parents)
                self._made = [folder for folder in parents if not folder.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = self._locked()
                self.holds_earlier_files = not self.is_empty()
        except BaseException:
            remove_empty(self._made)
            raise
        return self

    def check(self) -> None:
        """Check that nothing of the user's has this name.

        Raises:
            StorageError: If it has.
        """
        with writing(self.path):
            if not os.path.lexists(self.path):
                return
            status = self.path.lstat()
            ours = stat.S_ISDIR(status.st_mode) and (
                (self.path / MARKER).is_file() or not any(self.path.iterdir())
            )
        if not ours:
            raise StorageError(
                f"{self.path}: unfinished output is kept under this name, but this is not from "
                f"this version of rematch ({MARKER} is not in it), so it is left alone. Move it "
                "away, or choose another output."
            )

    def _locked(self) -> int:
        """Lock the marker, and write into it whose it is."""
        marker = self.path / MARKER
        lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 200).decode(errors="replace").strip()
                raise StorageError(
                    f"{self.path}: another process ({owner or 'just started'}) is writing "
                    f"{self.output}. Wait until it is done, or choose another output."
                ) from None
            except OSError as error:  # a file system without locks
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            if not os.path.samestat(os.fstat(lock), marker.stat()):
                raise FileNotFoundError(errno.ENOENT, "another process has just removed it")
            with suppress(OSError):  # only for the message to others
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_empty(self) -> bool:
        """Whether there is nothing in it but the marker."""
        return all(path.name == MARKER for path in self.path.iterdir())

    def empty(self) -> None:
        """Remove everything in it but the marker."""
        self._check_locked()
        for path in self.path.iterdir():
            if path.name != MARKER:
                remove(path)
        self.holds_earlier_files = False

    def discard(self) -> None:
        """Remove it, and the folders above that were made for it."""
        self._check_locked()
        with suppress(OSError):
            self.empty()
            (self.path / MARKER).unlink()
            remove_empty(self._made or [self.path])

    def publish(self) -> None:
        """Rename it to ``OUTPUT``, which may be an empty directory.

        Raises:
            StorageError: If there is something else by now.
        """
        self._check_locked()
        try:
            self.path.rename(self.output)
        except OSError as error:
            raise StorageError(
                f"{self.output}: cannot take its place ({error.strerror}). What was written is "
                f"complete, in {self.path}; move {self.output} away, and rename it."
            ) from None
        (self.output / MARKER).unlink(missing_ok=True)

    def _check_locked(self) -> None:
        assert self._lock is not None, "only inside its `with` statement"


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named(path: Path) -> Path:
    """A path that ends in a name: ``.`` and ``..`` are resolved, a link keeps its own name.

    >>> named(Path("shop.jsonl")).name, named(Path(".")).name == Path.cwd().name
    ('shop.jsonl', True)
    """
    return path if path.name.strip(".") else path.resolve()
