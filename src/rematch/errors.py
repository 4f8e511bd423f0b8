"""Errors that a user can correct.

Every message says what was seen, why it is wrong and what to do::

    RematchError(ValueError)
    ├── ImageError
    ├── TooLongError
    ├── DataError
    │   └── StorageError
    ├── RecipeError
    ├── ModelError
    └── TrainingError
"""

from reprlib import Repr

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60


class RematchError(ValueError):
    """Base class of every error that input, data or settings can cause.

    The command line prints it and exits with :attr:`exit_status`.

    Attributes:
        exit_status: 2, or 1 for a :class:`StorageError`.
    """

    exit_status = 2


class ImageError(RematchError):
    """A picture is missing, cannot be decoded, or is too large."""


class TooLongError(RematchError):
    """An input has more tokens than the model or the memory takes."""


class DataError(RematchError):
    """A data file or one of its rows cannot be used."""


class StorageError(DataError):
    """A file or directory is damaged, in use or not ours, or cannot be written."""

    exit_status = 1


class RecipeError(RematchError):
    """A recipe has an unknown key or an invalid value."""


class ModelError(RematchError):
    """A backbone cannot be used, or a checkpoint is incomplete or belongs to another base."""


class TrainingError(RematchError):
    """A training run cannot continue."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """An error of a library as a part of one line.

    >>> first_line(KeyError("a")), first_line(MemoryError())
    ("KeyError: 'a'", 'MemoryError')
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    name = type(error).__name__
    text = lines[0].strip() if lines else ""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    if isinstance(error, OSError | SyntaxError) and text:
        return text
    return f"{name}: {text}" if text else name


def shortened(value: object) -> str:
    """A value as an error shows it, however large or deep it is.

    >>> shortened("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    try:
        return _REPR.repr(value)
    except ValueError:  # of numbers with more digits than Python writes
        return f"a {type(value).__name__}"
