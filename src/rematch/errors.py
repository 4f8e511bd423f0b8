"""Mistakes a user can make, told as: what was seen, why it is wrong, what to do."""


class RematchError(ValueError):
    """Base of every error that input, data or settings can cause. The command line prints it and
    exits with 2.
    """


class ImageError(RematchError):
    """A picture is missing, truncated, or too large to open."""


class TooLongError(RematchError):
    """An input has more tokens than the model takes."""


class DataError(RematchError):
    """A data file or one of its rows cannot be used."""


class RecipeError(RematchError):
    """A recipe has an unknown key or a value of the wrong kind."""


class ModelError(RematchError):
    """A backbone cannot be used, or a checkpoint is incomplete or belongs to another base."""


class TrainingError(RematchError):
    """A training run cannot go on."""
