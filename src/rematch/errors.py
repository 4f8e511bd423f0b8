"""Errors that a user can correct.

Every message says what was seen, why it is wrong and what to do::

    RematchError(ValueError)
    ├── ImageError
    ├── TooLongError
    ├── DataError
    ├── RecipeError
    ├── ModelError
    └── TrainingError
"""


class RematchError(ValueError):
    """Base class of every error that input, data or settings can cause.

    The command line prints it and exits with status 2.
    """


class ImageError(RematchError):
    """A picture is missing, cannot be decoded, or is too large."""


class TooLongError(RematchError):
    """An input has more tokens than the model takes."""


class DataError(RematchError):
    """A data file or one of its rows cannot be used."""


class RecipeError(RematchError):
    """A recipe has an unknown key or an invalid value."""


class ModelError(RematchError):
    """A backbone cannot be used, or a checkpoint is incomplete or belongs to another base."""


class TrainingError(RematchError):
    """A training run cannot continue."""
