"""Checkpoints of an unfinished run: which are complete, and which run they belong to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import TrainerState

from rematch.errors import RecipeError, RematchError, TrainingError, first_line
from rematch.files import read_regular, write_json
from rematch.train.build import precision_of
from rematch.train.recipe import Recipe

COMPLETE = "complete.json"  # written last; lists the files of a checkpoint with their sizes
_LARGEST_LIST = 16 << 20  # bytes
_REMEDY = (
    "Restore it, or remove the checkpoint: the run then resumes from the one before it, or starts "
    "again."
)


def mark_complete(checkpoint: Path, step: int) -> None:
    """Write the file that lists a checkpoint's files; a checkpoint without it is incomplete."""
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in checkpoint.rglob("*")
        if file.is_file()
    }
    write_json(checkpoint / COMPLETE, {"step": step, "files": sizes})


def newest_checkpoint(directory: Path) -> Path | None:
    """The last complete checkpoint in a directory, or ``None``."""
    complete = [
        mark.parent
        for mark in directory.glob(f"checkpoint-*/{COMPLETE}")
        if mark.parent.name.removeprefix("checkpoint-").isdecimal()
    ]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    >>> checkpoint_step(Path("model.partial/checkpoint-200"))
    200
    """
    return int(checkpoint.name.rpartition("-")[2])


def check_checkpoint(checkpoint: Path) -> None:
    """Check that a checkpoint has every file that it was written with, in full size.

    Raises:
        TrainingError: If a file is missing or has another size, or the state of the run cannot be
            read; the message names the file.
    """
    try:
        content = json.loads(read_regular(checkpoint / COMPLETE, _LARGEST_LIST))
        sizes = {str(name): int(size) for name, size in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise TrainingError(
            f"{checkpoint / COMPLETE}: does not list the files of its checkpoint, so they cannot "
            f"be checked. {_REMEDY}"
        ) from None
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            raise TrainingError(
                f"{file}: is missing, so the run cannot resume from this checkpoint. {_REMEDY}"
            )
        actual_size = file.stat().st_size
        if actual_size != size:
            raise TrainingError(
                f"{file}: has {actual_size:,} bytes, but was written with {size:,}, so the run "
                f"cannot resume from this checkpoint. {_REMEDY}"
            )
    with loading(checkpoint, "trainer_state.json"):
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step != checkpoint_step(checkpoint):
            raise ValueError(f"it is of step {state.global_step}")


@contextmanager
def loading(checkpoint: Path, part: str) -> Iterator[None]:
    """Turn whatever loading a part of a checkpoint raises into an error that names the part.

    Raises:
        TrainingError: If the block raises anything.
    """
    try:
        yield
    except RematchError:
        raise
    except Exception as error:
        # torch's message recommends to load the file as code
        is_pickle = isinstance(error, UnpicklingError)
        reason = "not what was written" if is_pickle else first_line(error)
        raise TrainingError(
            f"{checkpoint}: {part} cannot be loaded ({reason}), so the run cannot "
            f"resume from this checkpoint. {_REMEDY}"
        ) from error


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """What ``recipe.json`` holds: the recipe, and the arithmetic that it means on this machine.

    On other hardware a run with ``auto`` settings would resume in other arithmetic.
    """
    return recipe.model_dump(mode="json") | {"settled": precision_of(recipe)._asdict()}


def resumable_checkpoint(recipe: Recipe, directory: Path) -> Path | None:
    """The checkpoint to resume from, if a run of this recipe left one in ``directory``.

    Raises:
        RecipeError: If the checkpoint belongs to another recipe, or nothing says to which.
        TrainingError: If a file of the checkpoint is missing or incomplete.
    """
    checkpoint = newest_checkpoint(directory)
    if checkpoint is None:
        return None
    try:
        content = json.loads(read_regular(directory / "recipe.json", _LARGEST_LIST))
        previous = {section: dict(settings) for section, settings in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "is missing" if missing else "cannot be read as a recipe"
        raise RecipeError(
            f"{directory}: holds {checkpoint.name} of an unfinished run, but its recipe.json "
            f"{problem}, so nothing says which recipe the checkpoint belongs to. Restore "
            "recipe.json, choose another train.output=…, or remove the directory."
        ) from None
    changed = [
        f"{section}.{key}"
        for section, settings in recipe_record(recipe).items()
        for key, value in settings.items()
        if previous.get(section, {}).get(key) != value
    ]
    if changed:
        raise RecipeError(
            f"{directory}: holds an unfinished run of another recipe (it differs in "
            f"{', '.join(changed)}). Finish it with its own recipe, choose another "
            "train.output=…, or remove the directory."
        )
    check_checkpoint(checkpoint)
    return checkpoint
