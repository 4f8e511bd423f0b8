"""From rows of triplets to the forward passes of one training step.

1. Every distinct input is read once, every distinct picture set is collected once.
2. Distinct inputs are sorted by length and cut into mini-batches by token budget, pictures
   included: embedding steps.
3. So are the samples' matching sequences: matching steps. In ``reuse`` mode there are none:
   mini-batches hold whole samples then, and their embedding steps answer the questions too.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rematch.backbone.pictures import Pictures
from rematch.backbone.reading import Reading, too_long
from rematch.errors import DataError, RematchError
from rematch.matching import VIEWS, Packed, token_numbers
from rematch.model import ReMatch
from rematch.train.batch import Batch, Step

TASKS = {"query": "query", "positive": "document", "negative": "document"}
FULL = 0.9  # of a mini-batch's tokens at least are no padding


@dataclass
class Input:
    """A distinct input of the batch: with its task, its picture sets and its length as it is
    embedded.
    """

    reading: Reading
    task: str
    sets: list[int] = field(default_factory=list)
    length: int = 0


class Collator:
    """Makes a :class:`Batch` of dataset rows; needs no forward pass, so that data workers can do
    it.

    Each sample's questions are laid out once: its query, and d+ and d- in two document slots,
    which of them first is drawn at random. Where there is no hard negative, the positive of
    another sample serves as d-.

    Args:
        model: The model in training (its tokenizer and template).
        views: View pairs to ask about; none leaves matching out.
        tokens: Token budget of a mini-batch, padding included; one longer input is a mini-batch of
            its own.
        reuse: Answer the questions from the keys and values of the embedding pass (docs/reuse.md).
        skip: Errors of a sample that are no reason to stop: the row's ``substitute(attempt)``
            takes its place.
    """

    def __init__(
        self,
        model: ReMatch,
        views: Sequence[str] = VIEWS,
        tokens: int = 16_384,
        reuse: bool = False,
        skip: tuple[type[RematchError], ...] = (),
    ) -> None:
        self.model = model
        self.reader = model.backbone.reader
        self.views = [view.split("-") for view in views]
        self.questions = [
            (query, slot, document) for query, document in self.views for slot in (0, 1)
        ]
        self.tokens = tokens
        self.reuse = reuse and bool(views)
        self.skip = skip

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Batch]:
        columns = [name for name in TASKS if name in rows[0]]
        readings: dict[int, Reading] = {}
        distinct: dict[int, Input] = {}
        samples: list[list[int]] = []
        kept: list[dict[str, Any]] = []
        skipped: list[str] = []
        taken = {row["id"] for row in rows if "id" in row}
        for number, row in enumerate(rows):
            used, sample = self.read_sample(row, number, columns, readings, skipped, taken)
            samples.append([key for key, _ in sample])
            distinct.update(sample)
            kept.append(used)
        ids = [str(row.get("id", number)) for number, row in enumerate(kept)]
        temperatures = None
        if "temperature" in rows[0]:
            temperatures = torch.tensor([row["temperature"] for row in kept], dtype=torch.float64)
        used_readings = {id(member.reading): member.reading for member in distinct.values()}
        shown = [reading for reading in used_readings.values() if reading.vision]
        sets = {id(reading): i for i, reading in enumerate(shown)}
        for one in distinct.values():
            one.sets = [sets[id(one.reading)]] if one.reading.vision else []
            one.length = len(one.reading.ids) + self.model.fusion.num_tokens
        pictures = None
        if shown:
            pictures = Pictures.collect(
                [r.vision for r in shown], [r.visual_tokens for r in shown]
            )
            pictures = self.compact(pictures)
        triplets = [self.triplet(samples, i) for i in range(len(samples))] if self.views else []
        if self.reuse:
            keys, steps, inputs = self.reuse_steps(samples, triplets, distinct)
            batch = Batch(
                inputs,
                torch.tensor(keys),
                steps,
                [],
                pictures,
                self.tokens,
                temperatures,
                ids,
                skipped,
            )
            return {"batch": batch}
        keys = sorted(distinct, key=lambda key: distinct[key].length)
        inputs = _places(keys, samples)
        steps = self.embedding_steps([distinct[key] for key in keys])
        matching = self.matching_steps(keys, triplets, distinct) if triplets else []
        batch = Batch(
            inputs,
            torch.tensor(keys),
            steps,
            matching,
            pictures,
            self.tokens,
            temperatures,
            ids,
            skipped,
        )
        return {"batch": batch}

    def read_sample(
        self,
        row: dict[str, Any],
        number: int,
        columns: list[str],
        readings: dict[int, Reading],
        skipped: list[str],
        taken: set[str],
    ) -> tuple[dict[str, Any], list[tuple[int, "Input"]]]:
        """Read a sample's inputs, or those of a substitute if they are of a kind to skip.

        Args:
            row: The sample.
            number: Of the sample in the batch, for errors.
            columns: Its inputs.
            readings: What the batch has read so far, by content; what is read here is added.
            skipped: Samples that were left out, each with the reason; those left out here are
                added.
            taken: Ids of the samples in the batch; a substitute is another one, unless there are
                no more.

        Returns:
            The sample that is used, and for each column the key of its input and the input.
        """
        original, attempt = row, 0
        duplicates: list[dict[str, Any]] = []
        while True:
            try:
                inputs = self._inputs(row, number, columns, readings)
                taken.add(row.get("id", str(number)))
                return row, inputs
            except self.skip as error:
                skipped.append(f"{row.get('id', number)}: {error}")
                reason = error
            row = {}
            while not row:
                following = original["substitute"](attempt) if "substitute" in original else None
                attempt += 1
                if following is None and not duplicates:
                    raise DataError(
                        f"{original.get('id', number)}: it cannot be used, and neither can those "
                        f"of its source that were tried in its place; the last reason: {reason} "
                        "Mend the data, or raise the limit that it breaks."
                    )
                if following is None:
                    row = duplicates.pop(0)
                elif following["id"] in taken:
                    duplicates.append(following)
                else:
                    row = following

    def _inputs(
        self, row: dict[str, Any], number: int, columns: list[str], readings: dict[int, Reading]
    ) -> list[tuple[int, "Input"]]:
        inputs = []
        for column in columns:
            content, task = identity(row[column]), TASKS[column]
            if content not in readings:
                reading = self.reader.read(row[column], number)
                limit = self.reader.tokenizer.model_max_length
                if len(reading.ids) + self.model.fusion.num_tokens > limit:
                    raise too_long(number, limit)
                readings[content] = reading
            inputs.append((_number(content, task), Input(readings[content], task)))
        return inputs

    def compact(self, pictures: Pictures) -> Pictures:
        """Pictures in as little memory as the processor's numbers allow without loss."""
        processor = self.reader.processor.image_processor
        mean, std = (
            np.atleast_1d(getattr(processor, name, None) or 0.5)
            for name in ("image_mean", "image_std")
        )
        return pictures.compact(mean.tolist(), std.tolist(), self.model.backbone.model.dtype)

    def triplet(self, samples: list[list[int]], i: int) -> tuple[int, list[int], list[bool]]:
        """A sample's query, its documents in their slots, and whether each is relevant."""
        query, positive, *negative = samples[i]
        pair = [
            positive,
            negative[0] if negative else next_other([keys[1] for keys in samples], i),
        ]
        if _number(query, positive) % 2:  # at random, but the same in a resumed run
            pair.reverse()
        return query, pair, [document == positive for document in pair]

    def embedding_steps(self, members: list["Input"]) -> list[Step]:
        """Inputs in ascending length as padded mini-batches."""
        steps = []
        for chosen in cut([one.length for one in members], self.tokens):
            some = [members[i] for i in chosen]
            tensors = self.reader.embedding_batch(
                [one.reading for one in some], [one.task for one in some]
            )
            steps.append(Step(tensors, [number for one in some for number in one.sets]))
        return steps

    def matching_steps(
        self, keys: list[int], triplets: list[Any], distinct: dict[int, "Input"]
    ) -> list[Step]:
        """Packed questions about raw inputs and vectors, as mini-batches."""
        raw_query, raw_documents = (
            any(view[side] == "raw" for view in self.views) for side in (0, 1)
        )

        def content(query: int, documents: list[int]) -> int:
            shown = [query] * raw_query + documents * raw_documents
            return sum(len(distinct[key].reading.content.ids) for key in shown)

        def layout(some: list[Any]) -> tuple[Packed, list[Reading]]:
            rows = [(distinct[q].reading, [distinct[d].reading for d in ds]) for q, ds, _ in some]
            return self.reader.pack_matching(rows, [self.questions] * len(rows))

        query, documents, _ = triplets[0]
        rest = layout(triplets[:1])[0].input_ids.shape[1] - content(
            query, documents
        )  # prompt, placeholders, slots
        lengths = [rest + content(query, documents) for query, documents, _ in triplets]
        by_length = sorted(range(len(triplets)), key=lengths.__getitem__)
        sets = {id(one.reading): one.sets for one in distinct.values()}
        steps = []
        for chosen in cut([lengths[i] for i in by_length], self.tokens):
            members = [triplets[by_length[i]] for i in chosen]
            packed, shown = layout(members)
            tensors = dict(vars(packed))
            tensors["read"] = self.read(_places(keys, [[q, *ds] for q, ds, _ in members]))
            tensors["relevant"] = torch.tensor([relevant for _, _, relevant in members])
            steps.append(
                Step(tensors, [number for reading in shown for number in sets[id(reading)]])
            )
        return steps

    def reuse_steps(
        self, samples: list[list[int]], triplets: list[Any], distinct: dict[int, "Input"]
    ) -> tuple[list[int], list[Step], Tensor]:
        """Mini-batches of whole samples: their inputs to embed, and the questions about them.

        Returns:
            The inputs' keys in the order of their vectors, the steps, and which input stands
            where, (B, C).
        """

        def members(i: int) -> dict[int, None]:
            return dict.fromkeys([*samples[i], *triplets[i][1]])

        sizes = [sum(distinct[key].length for key in members(i)) for i in range(len(samples))]
        keys: list[int] = []
        steps: list[Step] = []
        inputs = torch.zeros(len(samples), len(samples[0]), dtype=torch.long)
        by_size = sorted(range(len(samples)), key=sizes.__getitem__)
        while by_size:
            count, filled = 0, 0
            while count < len(by_size) and (
                count == 0 or filled + sizes[by_size[count]] <= self.tokens
            ):
                filled += sizes[by_size[count]]
                count += 1
            chosen, by_size = by_size[:count], by_size[count:]
            asked = [triplets[i] for i in chosen]
            own = sorted(
                {key for i in chosen for key in members(i)},
                key=lambda key: (distinct[key].length, key),
            )
            parts = self.embedding_steps([distinct[key] for key in own])
            masks = [part.tensors["attention_mask"] for part in parts]
            *source, first, second = token_numbers(
                [*masks, self.reader.matching_prompts()["attention_mask"]]
            )
            read = {
                key: self.reader.embedded(distinct[key].reading, distinct[key].task) for key in own
            }
            there = {
                key: replace(read[key], source=numbers)
                for key, numbers in zip(own, source, strict=True)
            }
            rows = [[there[key] for key in (q, *ds)] for q, ds, _ in asked]
            tensors = dict(
                vars(self.reader.pack_reuse(rows, [self.questions] * len(rows), (first, second)))
            )
            tensors["read"] = self.read(_places(own, [[q, *ds] for q, ds, _ in asked]))
            tensors["relevant"] = torch.tensor([relevant for _, _, relevant in asked])
            inputs[chosen] = len(keys) + _places(own, [samples[i] for i in chosen])
            steps.append(Step(tensors, parts=parts))
            keys += own
        return keys, steps, inputs

    def read(self, places: Tensor) -> Tensor:
        """Which inputs stand in the placeholders, in reading order; ``places`` are query and
        documents, (b, 3).
        """
        asked = [any(q == "feat" for q, _ in self.views)] + [
            any(d == "feat" for _, d in self.views)
        ] * 2
        return places[:, torch.tensor(asked)].flatten()


def cut(lengths: Sequence[int], tokens: int) -> Iterable[range]:
    """Runs of ascending lengths that fit into a budget, padding included, and are at least
    ``FULL``.

    >>> list(cut([4, 4, 4, 9, 10], 24))
    [range(0, 3), range(3, 5)]
    """
    start, filled = 0, 0
    for i, length in enumerate(lengths):
        padded = (i - start + 1) * length
        if i > start and (padded > tokens or filled + length < FULL * padded):
            yield range(start, i)
            start, filled = i, 0
        filled += length
    yield range(start, len(lengths))


def next_other(positives: Sequence[int], i: int) -> int:
    """The next positive, cyclically, that differs from the i-th; the next one if none does.

    >>> next_other([7, 7, 9], 0)
    9
    """
    n = len(positives)
    following = [positives[(i + step) % n] for step in range(1, n)] or [positives[i]]
    return next((other for other in following if other != positives[i]), following[0])


def _places(keys: list[int], rows: list[list[int]]) -> Tensor:
    place = {key: i for i, key in enumerate(keys)}
    return torch.tensor([[place[key] for key in row] for row in rows])


def identity(value: Any) -> int:
    """A number that two inputs share if they are the same text and pictures (paths count by name)."""
    digest = hashlib.blake2b(digest_size=8)

    def add(part: Any) -> None:
        if isinstance(part, Image.Image):
            digest.update(f"{part.mode}{part.size}".encode() + part.tobytes())
        elif isinstance(part, dict):
            for name in sorted(part):
                digest.update(f"\0{name}\0".encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            for one in part:
                digest.update(b"\1")
                add(one)
        else:
            digest.update(f"{type(part).__name__} {part}".encode())

    add(value)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _number(*parts: Any) -> int:
    return int.from_bytes(
        hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big", signed=True
    )
