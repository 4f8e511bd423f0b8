"""From samples to the mini-batches of one step.

1. Every distinct input is read once; every distinct set of pictures is collected once.
2. Distinct inputs are sorted by length and split into mini-batches by a budget of tokens, pictures
   included: these are embedded.
3. So are the packed sequences of the samples' questions: these are answered. In ``reuse`` mode
   mini-batches hold whole samples instead, and embedding them answers their questions too.
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
from rematch.backbone.reading import Reading, too_long_error
from rematch.errors import DataError, RematchError
from rematch.matching import Form, Packed, Question, View, token_numbers
from rematch.model import ReMatch
from rematch.train.batch import Batch, MiniBatch

TASKS = {"query": "query", "positive": "document", "negative": "document"}
MIN_FULL = 0.9  # share of a mini-batch's tokens that are not padding, at least

Row = dict[str, Any]


@dataclass
class Input:
    """A distinct input of a batch.

    Attributes:
        reading: The input, tokenized.
        task: ``"query"`` or ``"document"``.
        picture_sets: Number of its picture set in the batch, if it has pictures.
        length: Its tokens as it is embedded.
    """

    reading: Reading
    task: str
    picture_sets: list[int] = field(default_factory=list)
    length: int = 0


@dataclass
class KeyTriplet:
    """Keys of a query and of two documents, and whether each document is the positive."""

    query: int
    documents: list[int]
    relevant: list[bool]

    @property
    def keys(self) -> list[int]:
        """Keys of the query and the documents."""
        return [self.query, *self.documents]


class Collator:
    """Makes a :class:`~rematch.train.batch.Batch` of dataset rows.

    It needs no forward pass, so data workers can do it. Each sample's questions are laid out once:
    its query, and d+ and d- in an order drawn at random. Without a hard negative, the positive of
    another sample serves as d-.

    Args:
        model: The model in training, for its tokenizer and template.
        views: Views to ask about; none leaves matching out.
        batch_tokens: Tokens of a mini-batch, padding included; a longer input is a mini-batch of
            its own.
        reuse: Answer questions from the keys and values of the embedding pass (docs/reuse.md).
        skip: Kinds of errors that skip a sample; the row's ``substitute(attempt)`` replaces it.
    """

    def __init__(
        self,
        model: ReMatch,
        views: Sequence[View | str] = tuple(View),
        batch_tokens: int = 16_384,
        reuse: bool = False,
        skip: tuple[type[RematchError], ...] = (),
    ) -> None:
        self.model = model
        self.reader, self.packer = model.backbone.reader, model.backbone.questions
        self.views = [View(view) for view in views]
        self.questions = [Question(view, document) for view in self.views for document in (0, 1)]
        self.batch_tokens = batch_tokens
        self.reuse = reuse and bool(views)
        self.skip = skip

    def __call__(self, rows: list[Row]) -> dict[str, Batch]:
        samples, inputs, used_rows, skipped = self.read_samples(rows)
        pictures = self.collect_pictures(inputs.values())
        triplets = [self.triplet(samples, i) for i in range(len(samples))] if self.views else []
        matching: list[MiniBatch] = []
        if self.reuse:
            keys, embedding, places = self.reuse_mini_batches(samples, triplets, inputs)
        else:
            keys = sorted(inputs, key=lambda key: inputs[key].length)
            embedding, places = self.embed_mini_batches(keys, inputs), _places(keys, samples)
            if triplets:
                matching = self.question_mini_batches(keys, triplets, inputs)
        temperatures = None
        if "temperature" in rows[0]:
            values = [row["temperature"] for row in used_rows]
            temperatures = torch.tensor(values, dtype=torch.float64)
        batch = Batch(
            places,
            torch.tensor(keys),
            embedding,
            matching,
            pictures,
            self.batch_tokens,
            temperatures,
            [str(row.get("id", number)) for number, row in enumerate(used_rows)],
            skipped,
        )
        return {"batch": batch}

    # ---- samples --------------------------------------------------------------------------------

    def read_samples(
        self, rows: list[Row]
    ) -> tuple[list[list[int]], dict[int, Input], list[Row], list[str]]:
        """Read the samples of a batch.

        Returns:
            For each sample the keys of its inputs; the distinct inputs by key; the rows, some of
            which may be substitutes; and the samples that were skipped, each with the reason.
        """
        columns = [name for name in TASKS if name in rows[0]]
        readings: dict[int, Reading] = {}
        inputs: dict[int, Input] = {}
        samples: list[list[int]] = []
        used_rows: list[Row] = []
        skipped: list[str] = []
        used_ids = {row["id"] for row in rows if "id" in row}
        for number, row in enumerate(rows):
            used_row, sample = self.read_sample(row, number, columns, readings, skipped, used_ids)
            samples.append([key for key, _ in sample])
            inputs.update(sample)
            used_rows.append(used_row)
        return samples, inputs, used_rows, skipped

    def read_sample(
        self,
        row: Row,
        number: int,
        columns: list[str],
        readings: dict[int, Reading],
        skipped: list[str],
        used_ids: set[str],
    ) -> tuple[Row, list[tuple[int, Input]]]:
        """Read a sample, or a substitute if its error is of a kind to skip.

        Args:
            row: The sample.
            number: Its number in the batch, for errors.
            columns: Names of its inputs.
            readings: Readings of the batch so far, by content key; new ones are added.
            skipped: Samples that were skipped, each with the reason; new ones are added.
            used_ids: Ids of the samples in the batch. A substitute has another id, unless the
                source has no more samples.

        Returns:
            The row that is used, and for each column the key of its input and the input.
        """
        original, attempt = row, 0
        duplicates: list[Row] = []
        while True:
            try:
                inputs = self._read_inputs(row, number, columns, readings)
                used_ids.add(row.get("id", str(number)))
                return row, inputs
            except self.skip as error:
                skipped.append(f"{row.get('id', number)}: {error}")
                reason = error
            row = {}
            while not row:
                candidate = original["substitute"](attempt) if "substitute" in original else None
                attempt += 1
                if candidate is None and not duplicates:
                    raise DataError(
                        f"{original.get('id', number)}: cannot be used, and neither can the "
                        f"samples that were tried in its place; the last reason: {reason} Fix the "
                        "data, or raise the limit that it exceeds."
                    )
                if candidate is None:
                    row = duplicates.pop(0)
                elif candidate["id"] in used_ids:
                    duplicates.append(candidate)
                else:
                    row = candidate

    def _read_inputs(
        self, row: Row, number: int, columns: list[str], readings: dict[int, Reading]
    ) -> list[tuple[int, Input]]:
        inputs = []
        limit = self.reader.tokenizer.model_max_length
        for column in columns:
            content, task = input_key(row[column]), TASKS[column]
            if content not in readings:
                reading = self.reader.read(row[column], number)
                if len(reading.ids) + self.model.fusion.num_tokens > limit:
                    raise too_long_error(number, limit)
                readings[content] = reading
            inputs.append((_hash(content, task), Input(readings[content], task)))
        return inputs

    def collect_pictures(self, inputs: Iterable[Input]) -> Pictures | None:
        """Collect the distinct picture sets, and complete the inputs with their numbers."""
        inputs = list(inputs)
        readings = {id(value.reading): value.reading for value in inputs}
        with_pictures = [reading for reading in readings.values() if reading.vision]
        numbers = {id(reading): number for number, reading in enumerate(with_pictures)}
        for value in inputs:
            if value.reading.vision:
                value.picture_sets = [numbers[id(value.reading)]]
            value.length = len(value.reading.ids) + self.model.fusion.num_tokens
        if not with_pictures:
            return None
        vision, tokens = zip(*((r.vision, r.visual_tokens) for r in with_pictures), strict=True)
        return self.compact(Pictures.collect(vision, tokens))

    def compact(self, pictures: Pictures) -> Pictures:
        """Pictures in as little memory as the processor's numbers allow without loss."""
        processor = self.reader.processor.image_processor
        mean = np.atleast_1d(getattr(processor, "image_mean", None) or 0.5)
        std = np.atleast_1d(getattr(processor, "image_std", None) or 0.5)
        return pictures.compact(mean.tolist(), std.tolist(), self.model.backbone.model.dtype)

    def triplet(self, samples: list[list[int]], i: int) -> KeyTriplet:
        """A sample's query and its two documents, in an order that a resumed run repeats."""
        query, positive, *_ = samples[i]
        documents = [positive, self.hard_negative(samples, i)]
        if _hash(query, positive) % 2:
            documents.reverse()
        return KeyTriplet(query, documents, [document == positive for document in documents])

    def hard_negative(self, samples: list[list[int]], i: int) -> int:
        """Key of the document that a sample's questions show as d-."""
        _, _, *negatives = samples[i]
        return negatives[0] if negatives else next_other([keys[1] for keys in samples], i)

    # ---- mini-batches ---------------------------------------------------------------------------

    def embed_mini_batches(self, keys: list[int], inputs: dict[int, Input]) -> list[MiniBatch]:
        """Inputs in ascending length as padded mini-batches."""
        mini_batches = []
        for places in split([inputs[key].length for key in keys], self.batch_tokens):
            members = [inputs[keys[place]] for place in places]
            readings, tasks = zip(*((m.reading, m.task) for m in members), strict=True)
            picture_sets = [number for member in members for number in member.picture_sets]
            tensors = self.reader.embedding_batch(readings, tasks)
            mini_batches.append(MiniBatch(tensors, picture_sets))
        return mini_batches

    def question_mini_batches(
        self, keys: list[int], triplets: list[KeyTriplet], inputs: dict[int, Input]
    ) -> list[MiniBatch]:
        """Packed questions as mini-batches.

        Args:
            keys: Keys of the distinct inputs, in the order of their embeddings.
            triplets: The samples' triplets.
            inputs: The distinct inputs by key.
        """
        raw = self._shown("raw")

        def content_tokens(triplet: KeyTriplet) -> int:
            return sum(len(inputs[triplet.keys[i]].reading.content.ids) for i in raw)

        def pack(members: list[KeyTriplet]) -> tuple[Packed, list[Reading]]:
            rows = [
                (inputs[t.query].reading, [inputs[key].reading for key in t.documents])
                for t in members
            ]
            return self.packer.pack(rows, [self.questions] * len(rows))

        first_length = pack(triplets[:1])[0].input_ids.shape[1]
        overhead = first_length - content_tokens(triplets[0])  # the same for every sample
        lengths = [overhead + content_tokens(triplet) for triplet in triplets]
        by_length = sorted(range(len(triplets)), key=lengths.__getitem__)
        sets = {id(value.reading): value.picture_sets for value in inputs.values()}
        mini_batches = []
        for places in split([lengths[i] for i in by_length], self.batch_tokens):
            members = [triplets[by_length[place]] for place in places]
            packed, readings = pack(members)
            picture_sets = [number for reading in readings for number in sets[id(reading)]]
            mini_batches.append(MiniBatch(self._tensors(packed, keys, members), picture_sets))
        return mini_batches

    def reuse_mini_batches(
        self, samples: list[list[int]], triplets: list[KeyTriplet], inputs: dict[int, Input]
    ) -> tuple[list[int], list[MiniBatch], Tensor]:
        """Mini-batches of whole samples: their inputs to embed, and the questions about them.

        Returns:
            Keys of the inputs in the order of their embeddings, the mini-batches, and the number
            of the input in each place, (B, C).
        """
        keys_of = [{*samples[i], *triplets[i].keys} for i in range(len(samples))]
        sizes = [sum(inputs[key].length for key in sample_keys) for sample_keys in keys_of]
        keys: list[int] = []
        mini_batches: list[MiniBatch] = []
        places = torch.zeros(len(samples), len(samples[0]), dtype=torch.long)
        by_size = sorted(range(len(samples)), key=sizes.__getitem__)
        for numbers in _fill([sizes[i] for i in by_size], self.batch_tokens):
            members = [by_size[number] for number in numbers]
            member_keys = sorted(
                {key for i in members for key in keys_of[i]},
                key=lambda key: (inputs[key].length, key),
            )
            parts = self.embed_mini_batches(member_keys, inputs)
            masks = [part.tensors["attention_mask"] for part in parts]
            prompts = self.packer.prompts()["attention_mask"]
            *computed, query_prompt, document_prompt = token_numbers([*masks, prompts])
            embedded = {
                key: replace(
                    self.reader.with_learnable_tokens(inputs[key].reading, inputs[key].task),
                    computed=c,
                )
                for key, c in zip(member_keys, computed, strict=True)
            }
            member_triplets = [triplets[i] for i in members]
            packed = self.packer.pack_reuse(
                [[embedded[key] for key in triplet.keys] for triplet in member_triplets],
                [self.questions] * len(members),
                (query_prompt, document_prompt),
            )
            tensors = self._tensors(packed, member_keys, member_triplets)
            mini_batches.append(MiniBatch(tensors, parts=parts))
            places[members] = len(keys) + _places(member_keys, [samples[i] for i in members])
            keys += member_keys
        return keys, mini_batches, places

    def _shown(self, form: Form) -> list[int]:
        """The inputs of a triplet that its sequence shows in a form, in order; 0 is the query."""
        query = [0] if any(view.query == form for view in self.views) else []
        documents = [1 + q.document for q in self.questions if q.view.document == form]
        if self.reuse or not self.packer.joint:  # each is shown once
            documents = sorted(set(documents))
        return query + documents

    def _tensors(
        self, packed: Packed, keys: list[int], triplets: list[KeyTriplet]
    ) -> dict[str, Tensor]:
        """Packed questions with the inputs in their placeholders, and the answers.

        Args:
            packed: The questions of the triplets.
            keys: Keys of the embedded inputs, in the order of their embeddings.
            triplets: The triplets.
        """
        places = _places(keys, [triplet.keys for triplet in triplets])  # (b, 3)
        return {
            **vars(packed),
            "placeholder_inputs": places[:, self._shown("feat")].flatten(),
            "relevant": torch.tensor([triplet.relevant for triplet in triplets]),
        }


def split(lengths: Sequence[int], tokens: int) -> Iterable[range]:
    """Split ascending lengths into runs that fit into a budget and are at least ``MIN_FULL``.

    Args:
        lengths: Lengths in tokens, ascending.
        tokens: The budget, padding included.

    >>> list(split([4, 4, 4, 9, 10], 24))
    [range(0, 3), range(3, 5)]
    """
    start, filled = 0, 0
    for i, length in enumerate(lengths):
        padded = (i - start + 1) * length
        if i > start and (padded > tokens or filled + length < MIN_FULL * padded):
            yield range(start, i)
            start, filled = i, 0
        filled += length
    yield range(start, len(lengths))


def _fill(sizes: Sequence[int], tokens: int) -> Iterable[range]:
    """Runs of sizes that sum up to a budget at most; a larger one is a run of its own."""
    start, filled = 0, 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > tokens:
            yield range(start, i)
            start, filled = i, 0
        filled += size
    yield range(start, len(sizes))


def next_other(positives: Sequence[int], i: int) -> int:
    """The next positive, cyclically, that differs from the i-th; the next one if none does.

    >>> next_other([7, 7, 9], 0)
    9
    """
    n = len(positives)
    following = [positives[(i + step) % n] for step in range(1, n)] or [positives[i]]
    return next((other for other in following if other != positives[i]), following[0])


def _places(keys: list[int], rows: list[list[int]]) -> Tensor:
    """Replace keys by their places in ``keys``."""
    place = {key: i for i, key in enumerate(keys)}
    return torch.tensor([[place[key] for key in row] for row in rows])


def input_key(value: Any) -> int:
    """A number that two inputs share if they have the same text and pictures.

    Pictures in files count by their path.
    """
    digest = hashlib.blake2b(digest_size=8)

    def add(part: Any) -> None:
        if isinstance(part, Image.Image):
            digest.update(f"{part.mode}{part.size}".encode() + part.tobytes())
        elif isinstance(part, dict):
            for name in sorted(part):
                digest.update(f"\0{name}\0".encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            for element in part:
                digest.update(b"\1")
                add(element)
        else:
            digest.update(f"{type(part).__name__} {part}".encode())

    add(value)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _hash(*parts: Any) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
