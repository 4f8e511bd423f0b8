"""Where training samples come from: sources opened, and the rows of a run in their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rematch.data.mmeb import load_mmeb_train
from rematch.data.picto_tasks import training_triplet
from rematch.data.schema import Triplet
from rematch.data.triplets import load_triplets
from rematch.errors import DataError
from rematch.train.plan import plan
from rematch.train.recipe import Recipe, Source

# of finding a document that can stand in for a hard negative, or a sample in place of another
_TRIES = 64


def build_dataset(recipe: Recipe) -> Dataset:
    """The rows ``query``, ``positive``(, ``negative``) of the whole run in their order, made or
    read when asked for.
    """
    settings, seed = recipe.data, recipe.train.seed
    total = recipe.train.steps * recipe.train.batch_size
    given = _given(recipe)
    sources = [
        part for source in given for part in _open(source, settings.samples or total, recipe)
    ]
    named = ", ".join(source.path for source in given)
    sizes = [source.size for source in sources]
    fewest = min(sizes) if settings.homogeneous else sum(sizes)
    if fewest < recipe.train.batch_size:
        raise DataError(
            f"{named}: {fewest} samples do not fill one batch of {recipe.train.batch_size}; lower "
            f"train.batch_size (train.batch_size={max(2, fewest)}) or bring more data."
        )
    weights = [source.weight for source in sources]
    order = plan(
        sizes, weights, recipe.train.steps, recipe.train.batch_size, seed, settings.homogeneous
    )
    return _rows(sources, recipe, order[:, 0], order[:, 1])


def build_validation(recipe: Recipe) -> Dataset | None:
    """The samples that are kept out of training, if any are."""
    if not recipe.data.validation:
        return None
    sources = [
        part for source in _given(recipe) for part in _open(source, 1, recipe, kept_out=True)
    ]
    order = [(number, i) for number, source in enumerate(sources) for i in range(source.size)]
    return _rows(sources, recipe, [s for s, _ in order], [i for _, i in order])


def _rows(sources: list["_Opened"], recipe: Recipe, numbers: Any, indices: Any) -> Dataset:
    with_negatives = recipe.data.hard_negatives and any(source.has_negatives for source in sources)
    rows = _Rows(
        sources,
        ["query", "positive"] + ["negative"] * with_negatives,
        recipe.data.document_instructions,
        recipe.train.seed,
    )
    return Dataset.from_dict({"source": numbers, "index": indices}).with_transform(rows)


def _given(recipe: Recipe) -> list[Source]:
    source = recipe.data.source
    return [Source(path=source)] if isinstance(source, str) else source


@dataclass(frozen=True)
class _Opened:
    name: str
    triplet: Callable[[int], Triplet]
    numbers: Sequence[int]
    size: int
    weight: float
    has_negatives: bool
    temperature: float


def _open(source: Source, most: int, recipe: Recipe, kept_out: bool = False) -> list[_Opened]:
    most, validation = source.samples or most, recipe.data.validation
    temperature = source.temperature or recipe.loss.temperature
    if source.path == "picto":
        seed, size = (
            (recipe.train.seed + 1_000_003, validation) if kept_out else (recipe.train.seed, most)
        )
        draw = partial(training_triplet, seed)
        return [
            _Opened(
                "picto", draw, range(1, size + 1), size, source.weight or most, True, temperature
            )
        ]
    path = Path(source.path)
    skip = recipe.data.unreadable == "skip"
    read = (
        load_mmeb_train(path, source.split, skip) if path.is_dir() else [load_triplets(path, skip)]
    )
    names = (
        [f"{source.path}, config {i}" for i, _ in enumerate(read, 1)]
        if len(read) > 1
        else [source.path]
    )
    parts = [list(enumerate(triplets, 1)) for triplets in read]  # numbered as in the file
    if validation:
        parts = [part[-validation:] if kept_out else part[:-validation] for part in parts]
    if (recipe.data.samples or source.samples) and not kept_out:
        drawn = [
            np.random.default_rng(recipe.train.seed).permutation(len(part))[:most]
            for part in parts
        ]
        parts = [
            [part[i] for i in sorted(chosen)] for part, chosen in zip(parts, drawn, strict=True)
        ]
    total = sum(map(len, parts))
    opened = []
    for name, part in zip(names, parts, strict=True):
        numbers, triplets = [number for number, _ in part], [triplet for _, triplet in part]
        with_negative = sum(t.negative is not None for t in triplets)
        if path.is_file() and 0 < with_negative < len(part) and recipe.data.hard_negatives:
            first = next(number for number, triplet in part if triplet.negative is None)
            raise DataError(
                f"{source.path}: sample {first} has no negative; some samples have a hard "
                "negative and others none. Give every one a negative, or train without them "
                "(data.hard_negatives=false)."
            )
        weight = (source.weight or total) * len(part) / max(1, total)
        get = triplets.__getitem__
        opened.append(
            _Opened(name, get, numbers, len(part), weight, bool(with_negative), temperature)
        )
    return opened


@dataclass(frozen=True)
class _Rows:
    """From places in the sources to the columns of a batch; a class, so that data workers can
    pickle it.
    """

    sources: list[_Opened]
    columns: list[str]
    document_instructions: bool
    seed: int

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        places = list(zip(batch["source"], batch["index"], strict=True))
        found = [self._whole(s, i) for s, i in places]
        instruct = {c: self.document_instructions or c == "query" for c in self.columns}
        columns: dict[str, list[Any]] = {
            c: [getattr(t, c).as_input(instruct[c]) for t in found] for c in self.columns
        }
        named = {
            "id": [
                f"{self.sources[s].name}, sample {self.sources[s].numbers[i]}" for s, i in places
            ]
        }
        temperatures = [self.sources[s].temperature for s, _ in places]
        substitutes = [partial(self.substitute, s, i) for s, i in places]
        return columns | named | {"temperature": temperatures, "substitute": substitutes}

    def substitute(self, source: int, index: int, attempt: int) -> dict[str, Any] | None:
        """Another sample of the same source, in place of one that is left out; the same in every
        run.

        Args:
            source: Of the sample that is left out.
            index: Likewise.
            attempt: How many substitutes were unfit before.

        Returns:
            A row; ``None`` if there are no more samples, or enough were tried.
        """
        size = self.sources[source].size
        tries = min(size - 1, _TRIES)
        if attempt >= tries:
            return None
        steps = np.random.default_rng((self.seed, source, index)).choice(
            size - 1, tries, replace=False
        )
        step = int(steps[attempt]) + 1
        row = self({"source": [source], "index": [(index + step) % size]})
        return {name: values[0] for name, values in row.items()}

    def _whole(self, source: int, index: int) -> Triplet:
        """A sample; if others have a hard negative and it has none, another sample's document of
        its source is it.
        """
        opened = self.sources[source]
        found = opened.triplet(index)
        if "negative" not in self.columns or found.negative is not None:
            return found
        rng = np.random.default_rng((self.seed, source, index))
        for other in rng.integers(opened.size, size=_TRIES):
            document = opened.triplet(int(other)).positive
            if (document.text, document.image) != (found.positive.text, found.positive.image):
                return replace(found, negative=document)
        raise DataError(
            f"{opened.name}: sample {opened.numbers[index]} has no hard negative, and none of "
            f"{_TRIES} other samples drawn has another document to stand in. Give it negatives, "
            "or train without them (data.hard_negatives=false)."
        )
