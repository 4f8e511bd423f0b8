"""Scores of documents for a query: the matching head's margins, MaxSim, truncated embeddings.

The matching head scores many documents of one query as follows:

1. Few documents share packed sequences with the query, which is then computed once per sequence.
2. For many documents, prompt and query are computed once, and the documents attend to their keys
   and values.
3. Sequences fill forward passes up to a budget of tokens. If a pass runs out of memory, it is
   halved.

The score of a document is its margin, the logit of Yes minus the logit of No; P(yes) is the
sigmoid of the margin.

Shapes: N documents, K token vectors, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rematch.backbone.key_values import KeyValues
from rematch.backbone.memory import is_out_of_memory
from rematch.backbone.module import Backbone
from rematch.backbone.pictures import PictureFeatures, Pictures, feature_inputs
from rematch.backbone.reading import Reading
from rematch.errors import RematchError
from rematch.matching import Matching, Packed, Question, Segment, View, token_numbers
from rematch.tokens import MultiTokenFusion, fuse

Floats = NDArray[np.float32]

_DOCUMENTS_PER_SEQUENCE = 8  # that stand in a sequence with their query
_DOCUMENTS_PER_ROW = 4  # that stand behind a query which was computed before
_RECENT_READINGS = 64  # documents whose tokens and pixels are kept, for the next queries


# ---- scores from vectors ------------------------------------------------------------------------


def maxsim(query: Floats, documents: Floats) -> Floats:
    """Mean, over a query's token vectors, of the best cosine with a document's token vectors.

    Args:
        query: Unit-length token vectors, (K, D).
        documents: Unit-length token vectors, (N, K, D).

    Returns:
        (N,)

    >>> maxsim(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[None, :1]).tolist()
    [0.5]
    """
    cosines: Floats = np.einsum("nkd,qd->nqk", documents, query, optimize=True)
    scores: Floats = cosines.max(axis=2).mean(axis=1)
    return scores


def truncate(vectors: Floats, dimensions: int) -> Floats:
    """The first dimensions of vectors (N, D), brought to unit length again (Matryoshka)."""
    if dimensions == vectors.shape[1]:
        return vectors
    head = vectors[:, :dimensions]
    unit: Floats = head / np.maximum(np.linalg.norm(head, axis=1, keepdims=True), 1e-12)
    return unit


def probability(margins: Floats) -> NDArray[np.float64]:
    """P(yes) in float64; in float32, every margin above 17 would give exactly 1.

    >>> bool(probability(np.array([0.0, 20.0], np.float32))[1] < 1)
    True
    """
    return torch.from_numpy(margins).double().sigmoid().numpy()


# ---- the matching head --------------------------------------------------------------------------


@dataclass
class _Row:
    """A packed sequence to be: a query and a few of its documents.

    Attributes:
        query: Vector of the query; unused in the raw form.
        query_reading: Reading of the query; ``None`` in the feat form.
        tokens: Length of the sequence.
        longest: Tokens of the longest input.
        numbers: Numbers of the documents, among all documents of the call.
        documents: Vectors of the documents; unused in the raw form.
        readings: Readings of the documents; ``None`` in the feat form.
    """

    query: Any
    query_reading: Reading | None
    tokens: int
    longest: int
    numbers: list[int] = field(default_factory=list)
    documents: list[Any] = field(default_factory=list)
    readings: list[Reading | None] = field(default_factory=list)

    def add(self, number: int, document: Any, reading: Reading | None, tokens: int) -> None:
        self.numbers.append(number)
        self.documents.append(document)
        self.readings.append(reading)
        self.tokens += tokens
        self.longest = max(self.longest, _length(reading))

    def halves(self) -> list["_Row"]:
        middle = _half(len(self.numbers))
        return [
            replace(
                self,
                numbers=self.numbers[part],
                documents=self.documents[part],
                readings=self.readings[part],
            )
            for part in (slice(middle), slice(middle, None))
        ]


class MatchingHead:
    """What answers matching questions: backbone, projector and LM head.

    Args:
        backbone: Backbone of the model.
        fusion: Fusion of the model, with the projector.
        embed: Embeds inputs for a task (``"query"`` or ``"document"``), where the feat form is
            asked for and inputs do not come as vectors.
        view: The forms that its questions show.
        batch_tokens: Tokens of a forward pass, padding included.
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: MultiTokenFusion,
        embed: Callable[[list[Any], str], Tensor],
        view: View,
        batch_tokens: int,
    ) -> None:
        self.backbone, self.fusion, self.embed = backbone, fusion, embed
        self.view, self.batch_tokens = view, batch_tokens
        self.device = backbone.model.device
        self.reuse = backbone.matching == Matching.REUSE

    def score_lists(
        self, queries: Sequence[Any], document_lists: Sequence[Sequence[Any]]
    ) -> list[Floats]:
        """Margins of each query's documents; several queries share forward passes.

        Args:
            queries: Inputs, or vectors for the feat form.
            document_lists: The documents of each query; inputs, or vectors for the feat form.

        Returns:
            For each query the margins of its documents, (N,).

        Raises:
            RematchError: If there are not as many lists as queries, or a single query and document
                do not fit into memory.
        """
        if len(queries) != len(document_lists):
            raise RematchError(
                f"{len(queries)} queries and {len(document_lists)} lists of documents. Pass one "
                "list for each query."
            )
        if not len(queries):
            return []
        ends = np.cumsum([len(documents) for documents in document_lists], dtype=int)
        numbers = [
            range(end - len(documents), end)
            for end, documents in zip(ends.tolist(), document_lists, strict=True)
        ]
        documents = [document for documents in document_lists for document in documents]
        queries = list(queries)
        if self.view.query == "feat":
            queries = self._vectors(queries, "query")
        if self.view.document == "feat":
            documents = self._vectors(documents, "document")
        margins = np.empty(len(documents), np.float32)
        short_lists: list[tuple[int, range]] = []
        for query_number, list_numbers in enumerate(numbers):
            if self.reuse or len(list_numbers) <= 2 * _DOCUMENTS_PER_SEQUENCE:
                short_lists.append((query_number, list_numbers))
            else:
                list_documents = [documents[i] for i in list_numbers]
                margins[list_numbers] = self._score_long_list(
                    queries[query_number], list_documents, query_number
                )
        for rows in self._batches(self._rows(short_lists, queries, documents)):
            for row, row_margins in zip(rows, self._score_rows(rows), strict=True):
                margins[row.numbers] = row_margins
        return np.split(margins, ends[:-1])

    # ---- few documents: packed with their query -------------------------------------------------

    def _rows(
        self, lists: list[tuple[int, range]], queries: Sequence[Any], documents: Sequence[Any]
    ) -> Iterator[_Row]:
        """Rows of a query and at most eight of its documents, read one after the other.

        Args:
            lists: For each list the number of its query and the numbers of its documents.
            queries: The queries.
            documents: The documents.
        """
        reader = self.backbone.reader
        query_overhead, document_overhead = self.backbone.questions.overhead()
        recent: dict[int, Reading] = {}  # documents that several queries share are read once

        def read_document(number: int) -> Reading | None:
            if self.view.document == "feat":
                return None
            document = documents[number]
            reading = recent.pop(id(document), None) or reader.read(document, number)
            recent[id(document)] = reading
            if len(recent) > _RECENT_READINGS:
                del recent[next(iter(recent))]
            return reading

        for query_number, numbers in lists:
            query, query_reading = queries[query_number], None
            if self.view.query == "raw" and len(numbers):
                query_reading = reader.read(query, query_number)
            length = _length(query_reading)
            row = _Row(query, query_reading, query_overhead + length, length)
            for number in numbers:
                reading = read_document(number)
                tokens = document_overhead + _length(reading)
                too_long = row.tokens + tokens > self.batch_tokens
                if row.numbers and (too_long or len(row.numbers) == _DOCUMENTS_PER_SEQUENCE):
                    yield row
                    row = _Row(query, query_reading, query_overhead + length, length)
                row.add(number, documents[number], reading, tokens)
            if row.numbers:
                yield row

    def _batches(self, rows: Iterable[_Row]) -> Iterator[list[_Row]]:
        """Rows in their order, as many at a time as fit into the budget, padding included.

        In ``reuse`` mode inputs are padded to the longest input, otherwise sequences are padded.
        """

        def padded_tokens(rows: list[_Row]) -> int:
            if self.reuse:
                inputs = sum(1 + len(row.numbers) for row in rows)
                return inputs * max(row.longest for row in rows)
            return len(rows) * max(row.tokens for row in rows)

        batch: list[_Row] = []
        for row in rows:
            if batch and padded_tokens([*batch, row]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score_rows(self, rows: list[_Row]) -> list[Floats]:
        """Margins of each row's documents; halves the rows if memory runs out."""
        try:
            return self._score_batch(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(rows) > 1:
            middle = len(rows) // 2
            return self._score_rows(rows[:middle]) + self._score_rows(rows[middle:])
        return [np.concatenate(self._score_rows(rows[0].halves()))]

    def _score_batch(self, rows: list[_Row]) -> list[Floats]:
        questions = [[Question(self.view, i) for i in range(len(row.numbers))] for row in rows]
        readings: dict[int, tuple[Reading, str]] = {}  # each input once, with its task
        vectors: list[Tensor] = []  # of the placeholders, in reading order
        for row in rows:
            if row.query_reading is not None:
                readings[id(row.query_reading)] = (row.query_reading, "query")
            for reading in row.readings:
                if reading is not None:
                    readings[id(reading)] = (reading, "document")
            if self.view.query == "feat":
                vectors.append(row.query)
            if self.view.document == "feat":
                vectors += row.documents
        with_pictures = [reading for reading, _ in readings.values() if reading.vision]
        ids = [id(reading) for reading in with_pictures]
        features = dict(zip(ids, self._picture_features(with_pictures), strict=True))
        embeddings = torch.stack(vectors) if vectors else None
        if self.reuse:
            margins = self._reusing_margins(rows, questions, readings, features, embeddings)
        else:
            packed, shown = self.backbone.questions.pack(
                [(row.query_reading, row.readings) for row in rows], questions
            )
            inputs = self._to_device(packed) | feature_inputs([features[id(r)] for r in shown])
            margins = self.backbone.answer_margins(inputs, self._project(embeddings))
        answers = margins.float().cpu().numpy()
        return [
            row_answers[: len(row.numbers)] for row, row_answers in zip(rows, answers, strict=True)
        ]

    def _reusing_margins(
        self,
        rows: list[_Row],
        questions: list[list[Question]],
        readings: dict[int, tuple[Reading, str]],
        features: dict[int, PictureFeatures],
        embeddings: Tensor | None,
    ) -> Tensor:
        """Margins from the keys and values of the embedding pass, (rows, documents)."""
        reader, packer = self.backbone.reader, self.backbone.questions
        batches = []
        if readings:
            inputs, tasks = zip(*readings.values(), strict=True)
            batches.append(reader.embedding_batch(inputs, tasks))
        masks = [batch["attention_mask"] for batch in batches]
        *numbers, query_prompt, document_prompt = token_numbers(
            [*masks, packer.prompts()["attention_mask"]]
        )
        embedded: dict[int, Segment] = {}
        for computed, (key, (reading, task)) in zip(numbers, readings.items(), strict=True):
            embedded[key] = replace(reader.with_learnable_tokens(reading, task), computed=computed)
        segments = [
            [embedded[id(r)] if r else None for r in (row.query_reading, *row.readings)]
            for row in rows
        ]
        packed = packer.pack_reuse(segments, questions, (query_prompt, document_prompt))
        in_order = [features[key] for key in readings if key in features]
        passes: dict[str, Any] = self._to_device(packed)
        passes["embeddings"] = embeddings
        passes["parts"] = [
            {name: value.to(self.device) for name, value in batch.items()} for batch in batches
        ]
        passes["picture_sets"] = [len(in_order) for _ in batches]
        answer = self.backbone.answer_margins
        _, margins = embed_and_answer(self.backbone, self.fusion, passes, in_order, answer)
        return margins

    # ---- many documents: behind a query that is computed once -----------------------------------

    def _score_long_list(self, query: Any, documents: Sequence[Any], query_number: int) -> Floats:
        reader, packer = self.backbone.reader, self.backbone.questions
        query_reading = reader.read(query, query_number) if self.view.query == "raw" else None
        packed, prefix = packer.pack_prefix(query_reading)
        readings = [query_reading] if query_reading else []
        projected = self._project(query[None]) if query_reading is None else None
        computed = KeyValues()
        try:
            self.backbone.run_packed(self._inputs(packed, readings), projected, computed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _pair_too_large() from None
        prefix_length = packed.input_ids.shape[1]
        _, overhead = packer.overhead()
        margins: list[Floats] = []
        chunk: list[tuple[Any, Reading | None]] = []
        longest = 0
        for number, document in enumerate(documents):
            reading = reader.read(document, number) if self.view.document == "raw" else None
            longest = max(longest, overhead + _length(reading))
            rows = -(-(len(chunk) + 1) // _DOCUMENTS_PER_ROW)
            row_length = prefix_length + min(_DOCUMENTS_PER_ROW, len(chunk) + 1) * longest
            if chunk and rows * row_length > self.batch_tokens:
                margins.append(self._score_behind(prefix, computed, chunk))
                chunk, longest = [], overhead + _length(reading)
            chunk.append((document, reading))
        return np.concatenate([*margins, self._score_behind(prefix, computed, chunk)])

    def _score_behind(
        self,
        prefix: list[Segment],
        computed: KeyValues,
        chunk: list[tuple[Any, Reading | None]],
    ) -> Floats:
        """Margins of documents behind a computed prefix; halves them if memory runs out."""
        try:
            return self._score_chunk(prefix, computed, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        middle = _half(len(chunk))
        halves = (chunk[:middle], chunk[middle:])
        return np.concatenate([self._score_behind(prefix, computed, half) for half in halves])

    def _score_chunk(
        self,
        prefix: list[Segment],
        computed: KeyValues,
        chunk: list[tuple[Any, Reading | None]],
    ) -> Floats:
        count = -(-len(chunk) // _DOCUMENTS_PER_ROW)
        bounds = [len(chunk) * i // count for i in range(count + 1)]
        readings = [reading for _, reading in chunk]
        rows = [readings[start:end] for start, end in pairwise(bounds)]
        packed = self.backbone.questions.pack_behind(prefix, rows)
        projected = None
        if self.view.document == "feat":
            projected = self._project(torch.stack([vector for vector, _ in chunk]))
        context = [
            (keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1))
            for keys, values in computed.new
        ]
        inputs = self._inputs(packed, [reading for reading in readings if reading])
        margins = self.backbone.answer_margins(inputs, projected, KeyValues(context))
        answers = margins.float().cpu().numpy()
        return np.concatenate(
            [
                row[: end - start]
                for row, (start, end) in zip(answers, pairwise(bounds), strict=True)
            ]
        )

    # ---- inputs of the backbone -----------------------------------------------------------------

    def _inputs(self, packed: Packed, readings: list[Reading]) -> dict[str, Any]:
        """Packed sequences with the features of the pictures in their readings."""
        with_pictures = [reading for reading in readings if reading.vision]
        return self._to_device(packed) | feature_inputs(self._picture_features(with_pictures))

    def _to_device(self, packed: Packed) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in vars(packed).items()}

    def _picture_features(self, readings: list[Reading]) -> list[PictureFeatures]:
        if not readings:
            return []
        vision, tokens = [r.vision for r in readings], [r.visual_tokens for r in readings]
        return self.backbone.picture_features(Pictures.collect(vision, tokens))

    def _project(self, embeddings: Tensor | None) -> Tensor | None:
        return None if embeddings is None else self.fusion.projector(embeddings)

    def _vectors(self, inputs: Sequence[Any], task: str) -> list[Tensor]:
        """A vector for each input: as it was passed, or its embedding.

        An object that occurs several times is embedded once.
        """
        distinct = {id(value): value for value in inputs}
        if all(isinstance(value, np.ndarray | Tensor) for value in distinct.values()):
            vectors = [torch.as_tensor(value).to(self.device) for value in distinct.values()]
        else:
            vectors = list(self.embed(list(distinct.values()), task).to(self.device))
        by_id = dict(zip(distinct, vectors, strict=True))
        return [by_id[id(value)] for value in inputs]


def embed_and_answer(
    backbone: Backbone,
    fusion: MultiTokenFusion,
    inputs: dict[str, Any],
    features: Sequence[PictureFeatures],
    answer: Callable[..., Tensor],
) -> tuple[Tensor | None, Tensor]:
    """Embed inputs and answer questions about them from the same keys and values (docs/reuse.md).

    Args:
        backbone: Backbone of the model.
        fusion: Fusion of the model.
        inputs: As for :meth:`rematch.ReMatch.embed_and_answer`.
        features: Features of the picture sets, in reading order.
        answer: What is computed at the answer slots: a method of the backbone.

    Returns:
        The multi-vectors (N, K, D), or ``None`` if nothing is embedded; and the answers.
    """
    remaining = iter(features)
    parts = [
        part | feature_inputs([next(remaining) for _ in range(count)])
        for part, count in zip(inputs["parts"], inputs["picture_sets"], strict=True)
    ]
    device = backbone.model.device
    prompts = {name: value.to(device) for name, value in backbone.questions.prompts().items()}
    (*states, prompt_states), layers = backbone.embed_with_key_values([*parts, prompts])
    multi_vectors = [
        fusion({"token_embeddings": state, "attention_mask": part["attention_mask"]})[
            "multi_vector"
        ]
        for state, part in zip(states, parts, strict=True)
    ]
    context = inputs["context"]

    def gathered(tokens: Tensor) -> Tensor:  # (tokens, heads, width) → (B, heads, C, width)
        selected = tokens.index_select(0, context.flatten())
        return selected.view(*context.shape, *tokens.shape[1:]).transpose(1, 2)

    cache = KeyValues([(gathered(keys), gathered(values)) for keys, values in layers])
    multi_vector = torch.cat(multi_vectors) if multi_vectors else None
    embeddings = inputs.get("embeddings")
    if "placeholder_inputs" in inputs and multi_vector is not None:
        embeddings = fuse(multi_vector)[inputs["placeholder_inputs"]]
    projected = None
    if embeddings is not None and len(embeddings):
        projected = fusion.projector(embeddings)
    answers = answer(inputs, projected, cache)
    if torch.is_grad_enabled():  # FSDP2 gathers a layer's weights for the gradient of its output
        answers = answers + 0.0 * prompt_states.sum()
    return multi_vector, answers


def _length(reading: Reading | None) -> int:
    """Tokens of an input; a vector is one."""
    return len(reading.ids) if reading else 1


def _half(count: int) -> int:
    if count == 1:
        raise _pair_too_large()
    return count // 2


def _pair_too_large() -> RematchError:
    return RematchError(
        "out of memory with a single query and document. Shorten them, use smaller pictures, or "
        "use a machine with more memory."
    )
