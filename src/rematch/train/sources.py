"""The rows of a training run: sources are opened, and their samples drawn in a fixed order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from rematch.data.mmeb import load_mmeb_train
from rematch.data.picto_tasks import training_triplet
from rematch.data.schema import Triplet
from rematch.data.triplets import load_triplets
from rematch.errors import DataError
from rematch.train.plan import plan_samples
from rematch.train.recipe import Recipe, Source

_TRIES = 64  # draws of a substitute for a sample, or of a stand-in for a hard negative
_VALIDATION_SEED = 1_000_003  # added to the seed, so that held-out scenes are others


def build_dataset(recipe: Recipe) -> Dataset:
    """The rows of all batches, in order; each is made or read on access.

    Returns:
        Rows with ``query``, ``positive``, perhaps ``negative``, ``id``, ``temperature`` and
        ``substitute`` (:meth:`_RowMaker.substitute`).

    Raises:
        DataError: If a source cannot be read, or does not fill one batch.
    """
    settings, train = recipe.data, recipe.train
    sources = _open_sources(recipe)
    sizes = [source.size for source in sources]
    available = min(sizes) if settings.homogeneous else sum(sizes)
    if available < train.batch_size:
        paths = ", ".join(source.path for source in _sources_of(recipe))
        raise DataError(
            f"{paths}: {available} samples do not fill one batch of {train.batch_size}; lower "
            f"train.batch_size (train.batch_size={max(2, available)}) or add data."
        )
    order = plan_samples(
        sizes,
        [source.weight for source in sources],
        train.steps,
        train.batch_size,
        train.seed,
        settings.homogeneous,
    )
    return _dataset(sources, recipe, order[:, 0], order[:, 1])


def build_validation(recipe: Recipe) -> Dataset | None:
    """The rows held out for validation, or ``None`` if the recipe holds out none."""
    if not recipe.data.validation:
        return None
    sources = _open_sources(recipe, held_out=True)
    sizes = [source.size for source in sources]
    return _dataset(
        sources,
        recipe,
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
    )


def _dataset(
    sources: "list[_OpenSource]",
    recipe: Recipe,
    numbers: NDArray[np.int64],
    indices: NDArray[np.int64],
) -> Dataset:
    """Rows in order, each from the source with its number, at its index there."""
    columns = ["query", "positive"]
    if recipe.data.hard_negatives and any(source.has_negatives for source in sources):
        columns.append("negative")
    make_rows = _RowMaker(sources, columns, recipe.data.document_instructions, recipe.train.seed)
    return Dataset.from_dict({"source": numbers, "index": indices}).with_transform(make_rows)


# ---- opening sources ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenSource:
    """A source, or one config of it, ready to draw samples from.

    Attributes:
        name: Name for errors and for the ids of samples.
        triplet: Makes or reads the sample at an index.
        numbers: The number of each sample in its file, from 1.
        weight: Relative frequency of its samples.
        has_negatives: Whether some samples have a hard negative.
        temperature: τ of its queries.
    """

    name: str
    triplet: Callable[[int], Triplet]
    numbers: Sequence[int]
    weight: float
    has_negatives: bool
    temperature: float

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.numbers)


def _sources_of(recipe: Recipe) -> list[Source]:
    source = recipe.data.source
    return [Source(path=source)] if isinstance(source, str) else source


def _open_sources(recipe: Recipe, held_out: bool = False) -> list[_OpenSource]:
    """All sources of a recipe; with ``held_out`` only their validation samples."""
    sources = []
    for source in _sources_of(recipe):
        if source.path == "picto":
            sources.append(_open_picto(source, recipe, held_out))
        else:
            sources += _open_files(source, recipe, held_out)
    return sources


def _open_picto(source: Source, recipe: Recipe, held_out: bool) -> _OpenSource:
    seed, size = recipe.train.seed, source.samples or recipe.data.samples
    size = size or recipe.train.steps * recipe.train.batch_size
    weight = source.weight or size
    if held_out:
        seed, size = seed + _VALIDATION_SEED, recipe.data.validation
    return _OpenSource(
        "picto",
        partial(training_triplet, seed),
        range(1, size + 1),
        weight,
        has_negatives=True,
        temperature=source.temperature or recipe.loss.temperature,
    )


def _open_files(source: Source, recipe: Recipe, held_out: bool) -> list[_OpenSource]:
    """A file, or each config of a directory in MMEB-train form."""
    path = Path(source.path)
    skip = recipe.data.unreadable == "skip"
    if path.is_dir():
        configs = load_mmeb_train(path, source.split, skip)
    else:
        configs = [load_triplets(path, skip)]
    parts = [_select(triplets, source, recipe, held_out) for triplets in configs]
    total = sum(map(len, parts))
    sources = []
    for config, part in enumerate(parts, 1):
        numbers = [number for number, _ in part]
        triplets = [triplet for _, triplet in part]
        if path.is_file() and recipe.data.hard_negatives:
            _check_negatives(source, numbers, triplets)
        sources.append(
            _OpenSource(
                f"{source.path}, config {config}" if len(parts) > 1 else source.path,
                triplets.__getitem__,
                numbers,
                (source.weight or total) * len(part) / max(1, total),
                has_negatives=any(triplet.negative is not None for triplet in triplets),
                temperature=source.temperature or recipe.loss.temperature,
            )
        )
    return sources


def _select(
    triplets: list[Triplet], source: Source, recipe: Recipe, held_out: bool
) -> list[tuple[int, Triplet]]:
    """The samples to use, each with its number in the file: the last ones are held out."""
    numbered = list(enumerate(triplets, 1))
    validation = recipe.data.validation
    if held_out:
        return numbered[-validation:]
    if validation:
        numbered = numbered[:-validation]
    limit = source.samples or recipe.data.samples
    if limit is None:
        return numbered
    drawn = np.random.default_rng(recipe.train.seed).permutation(len(numbered))[:limit]
    return [numbered[i] for i in sorted(drawn)]


def _check_negatives(source: Source, numbers: list[int], triplets: list[Triplet]) -> None:
    """Refuse a file in which some samples have a hard negative and others do not."""
    without = [n for n, t in zip(numbers, triplets, strict=True) if t.negative is None]
    if without and len(without) < len(triplets):
        raise DataError(
            f"{source.path}: sample {without[0]} has no negative, but other samples have a hard "
            "negative. Give every sample one, or train without them (data.hard_negatives=false)."
        )


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RowMaker:
    """Turns source numbers and indices into rows; a class, so that data workers can pickle it."""

    sources: list[_OpenSource]
    columns: list[str]
    document_instructions: bool
    seed: int

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        places = list(zip(batch["source"], batch["index"], strict=True))
        triplets = [self._triplet(number, index) for number, index in places]
        rows: dict[str, list[Any]] = {}
        for column in self.columns:
            instruct = self.document_instructions or column == "query"
            rows[column] = [getattr(triplet, column).as_input(instruct) for triplet in triplets]
        rows["id"] = [self._id(number, index) for number, index in places]
        rows["temperature"] = [self.sources[number].temperature for number, _ in places]
        rows["substitute"] = [partial(self.substitute, *place) for place in places]
        return rows

    def _id(self, number: int, index: int) -> str:
        source = self.sources[number]
        return f"{source.name}, sample {source.numbers[index]}"

    def substitute(self, number: int, index: int, attempt: int) -> dict[str, Any] | None:
        """Draw another sample of the same source to replace one; the same in every run.

        Args:
            number: Number of the source.
            index: Index of the sample to replace.
            attempt: How many substitutes were tried before.

        Returns:
            A row; ``None`` if the source has no more samples, or enough were tried.
        """
        others = self.sources[number].size - 1
        tries = min(others, _TRIES)
        if attempt >= tries:
            return None
        rng = np.random.default_rng((self.seed, number, index))
        offset = 1 + int(rng.choice(others, tries, replace=False)[attempt])
        rows = self({"source": [number], "index": [(index + offset) % (others + 1)]})
        return {column: values[0] for column, values in rows.items()}

    def _triplet(self, number: int, index: int) -> Triplet:
        """A sample; if its hard negative is missing, another sample's positive stands in."""
        source = self.sources[number]
        triplet = source.triplet(index)
        if "negative" not in self.columns or triplet.negative is not None:
            return triplet
        positive = triplet.positive
        rng = np.random.default_rng((self.seed, number, index))
        for other in rng.integers(source.size, size=_TRIES):
            document = source.triplet(int(other)).positive
            if (document.text, document.image) != (positive.text, positive.image):
                return replace(triplet, negative=document)
        raise DataError(
            f"{self._id(number, index)} has no hard negative, and none of {_TRIES} other samples "
            "drawn from its source has another document that could stand in. Give it a negative, "
            "or train without hard negatives (data.hard_negatives=false)."
        )
