"""Scores of the matching head: questions packed into forward passes of a bounded size.

1. Pairs of one query share a sequence, in which the query is computed once.
2. One query with many documents: prompt and query run once, and the documents read their keys and
   values.
3. Sequences fill forward passes up to a budget of tokens; where memory runs out, half of them are
   tried at a time.

The score of a pair is the margin, logit of Yes minus logit of No; P(yes) is its sigmoid.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rematch.backbone.key_values import KeyValues
from rematch.backbone.memory import is_out_of_memory
from rematch.backbone.module import Backbone
from rematch.backbone.pictures import Pictures, Seen, as_inputs, see
from rematch.backbone.reading import Reading
from rematch.errors import RematchError
from rematch.matching import VIEWS, Packed, Segment, token_numbers
from rematch.tokens import MultiTokenFusion, fuse

_DOCUMENTS_PER_PACK, _PER_ROW = (
    8,
    4,
)  # in a sequence with the query; behind a query that was run before
_RECENT = 64  # documents whose tokens and pixels are kept


@dataclass
class _Row:
    """A sequence to be: a query with a few documents, and the numbers of these pairs.

    Attributes:
        query: Its vector, where that is read; else unused.
        query_reading: Its tokens, where they are read.
        pairs: Numbers of the pairs.
        documents: Their vectors, where these are read.
        readings: Their tokens, where these are read.
        tokens: Of the whole sequence.
        longest: Tokens of the longest input.
    """

    query: Any
    query_reading: Reading | None
    pairs: list[int]
    documents: list[Any]
    readings: list[Reading | None]
    tokens: int
    longest: int

    def add(self, pair: int, document: Any, reading: Reading | None, tokens: int) -> None:
        self.pairs.append(pair)
        self.documents.append(document)
        self.readings.append(reading)
        self.tokens += tokens
        self.longest = max(self.longest, _length(reading))

    def halves(self) -> list["_Row"]:
        half = _half(len(self.pairs))
        return [
            replace(
                self,
                pairs=self.pairs[part],
                documents=self.documents[part],
                readings=self.readings[part],
            )
            for part in (slice(half), slice(half, None))
        ]


def _length(reading: Reading | None) -> int:
    return len(reading.ids) if reading else 1


def _half(count: int) -> int:
    if count == 1:
        raise _pair_too_large()
    return count // 2


def _pair_too_large() -> RematchError:
    return RematchError(
        "out of memory with a single query and document. Shorten them, use smaller pictures, or a "
        "machine with more memory."
    )


def _batches(rows: Iterable[_Row], budget: int, reuse: bool) -> Iterator[list[_Row]]:
    """Rows as they come, as many at a time as fit into a budget of tokens, padding included.

    In ``reuse`` mode the inputs are padded to the longest of all, else the sequences are.
    """

    def padded(rows: list[_Row]) -> int:
        if reuse:
            return sum(1 + len(row.pairs) for row in rows) * max(row.longest for row in rows)
        return len(rows) * max(row.tokens for row in rows)

    batch: list[_Row] = []
    for row in rows:
        if batch and padded([*batch, row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def probability(margins: NDArray[np.float32]) -> NDArray[np.float64]:
    """P(yes), in float64: in float32 those of all margins above 17 would be 1.

    >>> bool(probability(np.array([0.0, 20.0], np.float32))[1] < 1)
    True
    """
    return torch.from_numpy(margins).double().sigmoid().numpy()


class Judge:
    """Answers of a model's matching head.

    Args:
        backbone: Of the model.
        fusion: Of the model.
        embed: Embeds inputs for a task, ``"query"`` or ``"document"``, where a vector is read and
            none was passed.
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: MultiTokenFusion,
        embed: Callable[[list[Any], str], Tensor],
    ) -> None:
        self.backbone, self.fusion, self.embed = backbone, fusion, embed
        self.device = backbone.model.device

    def margins(
        self, queries: Sequence[Any], documents: Sequence[Any], views: str, budget: int
    ) -> NDArray[np.float32]:
        """Logit of Yes minus logit of No for each pair, (N,).

        Args:
            queries: As for :meth:`~rematch.model.ReMatch.match`.
            documents: Likewise.
            views: Likewise.
            budget: Tokens of a forward pass.

        Raises:
            RematchError: As :meth:`~rematch.model.ReMatch.match`.
        """
        if views not in VIEWS:
            raise RematchError(f"views={views!r} is unknown; choose one of {', '.join(VIEWS)}.")
        if len(queries) != len(documents):
            raise RematchError(
                f"{len(queries)} queries and {len(documents)} documents: match wants pairs, one "
                "for one."
            )
        reuse = self.backbone.matching == "reuse"
        query_view, document_view = views.split("-")
        queries, documents = (
            list(queries),
            list(documents),
        )  # rows of an array are new objects each time
        groups: list[list[int]] = []
        for i, query in enumerate(queries):
            if groups and queries[groups[-1][0]] is query:
                groups[-1].append(i)
            else:
                groups.append([i])
        if query_view == "feat":
            queries = self._vectors(queries, "query")
        if document_view == "feat":
            documents = self._vectors(documents, "document")
        margins = np.empty(len(queries), np.float32)
        packed: list[list[int]] = []
        for group in groups:
            if len(group) <= 2 * _DOCUMENTS_PER_PACK or reuse:
                packed.append(group)
            else:
                margins[group] = self._match_many(
                    queries[group[0]], [documents[i] for i in group], views, budget
                )
        for batch in _batches(
            self._rows(queries, documents, packed, views, budget), budget, reuse
        ):
            for row, judged in zip(batch, self._match_rows(batch, views), strict=True):
                margins[row.pairs] = judged
        return margins

    def _rows(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        groups: list[list[int]],
        views: str,
        budget: int,
    ) -> Iterator["_Row"]:
        """Sequences of a query and a few of its documents, read one after the other."""
        reader, (query_view, document_view) = self.backbone.reader, views.split("-")
        for_query, for_document = reader.matching_overhead()
        recent: dict[
            int, Reading
        ] = {}  # documents that several queries share are read once while they are near

        def read_document(i: int) -> Reading | None:
            if document_view == "feat":
                return None
            key = id(documents[i])
            reading = recent.pop(key, None) or reader.read(documents[i], i)
            recent[key] = reading
            if len(recent) > _RECENT:
                del recent[next(iter(recent))]
            return reading

        for group in groups:
            query = queries[group[0]]
            query_reading = reader.read(query, group[0]) if query_view == "raw" else None
            row = None
            for i in group:
                reading = read_document(i)
                tokens = for_document + _length(reading)
                if (
                    row is None
                    or row.tokens + tokens > budget
                    or len(row.pairs) == _DOCUMENTS_PER_PACK
                ):
                    if row is not None:
                        yield row
                    length = _length(query_reading)
                    row = _Row(query, query_reading, [], [], [], for_query + length, length)
                row.add(i, documents[i], reading, tokens)
            if row is not None:
                yield row

    def _match_many(
        self, query: Any, documents: Sequence[Any], views: str, budget: int
    ) -> NDArray[np.float32]:
        """One query with many documents: prompt and query run once, and the documents read their
        keys and values.
        """
        reader = self.backbone.reader
        query_view, document_view = views.split("-")
        query_reading = reader.read(query) if query_view == "raw" else None
        packed, prefix = reader.pack_prefix(query_reading)
        z = self.fusion.projector(query[None]) if query_reading is None else None
        computed = KeyValues()
        try:
            self.backbone.run_packed(
                self._packed(packed, [query_reading] if query_reading else []), z, computed
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _pair_too_large() from None
        before = packed.input_ids.shape[1]
        _, for_document = reader.matching_overhead()
        margins: list[NDArray[np.float32]] = []
        chunk: list[tuple[Any, Reading | None]] = []
        longest = 0
        for i, document in enumerate(documents):
            reading = reader.read(document, i) if document_view == "raw" else None
            longest = max(longest, for_document + _length(reading))
            rows = -(-(len(chunk) + 1) // _PER_ROW)
            if chunk and rows * (before + min(_PER_ROW, len(chunk) + 1) * longest) > budget:
                margins.append(self._match_behind(prefix, computed, chunk))
                chunk, longest = [], for_document + _length(reading)
            chunk.append((document, reading))
        return np.concatenate([*margins, self._match_behind(prefix, computed, chunk)])

    def _match_behind(
        self, prefix: list[Segment], computed: KeyValues, chunk: list[tuple[Any, Reading | None]]
    ) -> NDArray[np.float32]:
        """Documents behind a prefix that was run before, half of them at a time if memory runs
        out.
        """
        try:
            return self._run_behind(prefix, computed, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        half = _half(len(chunk))
        return np.concatenate(
            [
                self._match_behind(prefix, computed, chunk[:half]),
                self._match_behind(prefix, computed, chunk[half:]),
            ]
        )

    def _run_behind(
        self, prefix: list[Segment], computed: KeyValues, chunk: list[tuple[Any, Reading | None]]
    ) -> NDArray[np.float32]:
        count = -(-len(chunk) // _PER_ROW)
        bounds = [len(chunk) * i // count for i in range(count + 1)]
        readings = [reading for _, reading in chunk]
        packed = self.backbone.reader.pack_behind(
            prefix, [readings[a:b] for a, b in pairwise(bounds)]
        )
        z = None
        if readings[0] is None:
            z = self.fusion.projector(torch.stack([vector for vector, _ in chunk]))
        keys_values = [
            (k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in computed.new
        ]
        features = self._packed(packed, [reading for reading in readings if reading])
        judged = (
            self.backbone.answer_margins(features, z, KeyValues(keys_values)).float().cpu().numpy()
        )
        return np.concatenate(
            [row[: b - a] for row, (a, b) in zip(judged, pairwise(bounds), strict=True)]
        )

    def _packed(self, packed: Packed, readings: list[Reading]) -> dict[str, Any]:
        """Packed sequences as features, with the pictures of the readings that they show."""
        pictures = [reading for reading in readings if reading.vision]
        seen: list[Seen] = []
        if pictures:
            seen = self._see(
                Pictures.collect([r.vision for r in pictures], [r.visual_tokens for r in pictures])
            )
        return {name: value.to(self.device) for name, value in vars(packed).items()} | as_inputs(
            seen
        )

    def _match_rows(self, rows: list["_Row"], views: str) -> list[NDArray[np.float32]]:
        """Margins of each row's pairs, half of the rows at a time if memory runs out."""
        try:
            return self._match_batch(rows, *views.split("-"))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(rows) > 1:
            half = _half(len(rows))
            return self._match_rows(rows[:half], views) + self._match_rows(rows[half:], views)
        return [np.concatenate(self._match_rows(rows[0].halves(), views))]

    def _match_batch(
        self, rows: list["_Row"], query_view: str, document_view: str
    ) -> list[NDArray[np.float32]]:
        reader = self.backbone.reader
        questions = [
            [(query_view, i, document_view) for i in range(len(row.pairs))] for row in rows
        ]
        tasks: dict[
            int, tuple[Reading, str]
        ] = {}  # an input in several rows is embedded, and its pictures seen, once
        for row in rows:
            for reading, task in [
                (row.query_reading, "query"),
                *((r, "document") for r in row.readings),
            ]:
                if reading is not None:
                    tasks[id(reading)] = (reading, task)
        pictures = {key: reading for key, (reading, _) in tasks.items() if reading.vision}
        seen: dict[int, Seen] = {}
        if pictures:
            collected = Pictures.collect(
                [r.vision for r in pictures.values()], [r.visual_tokens for r in pictures.values()]
            )
            seen = dict(zip(pictures, self._see(collected), strict=True))
        vectors = []  # of the placeholders, in reading order
        for row in rows:
            if query_view == "feat":
                vectors.append(row.query)
            if document_view == "feat":
                vectors += row.documents
        z_inputs = torch.stack(vectors) if vectors else None
        if self.backbone.matching == "reuse":
            judged = self._match_reusing(rows, questions, tasks, seen, z_inputs)
        else:
            packed, shown = reader.pack_matching(
                [(row.query_reading, row.readings) for row in rows], questions
            )
            features = {name: value.to(self.device) for name, value in vars(packed).items()}
            z = self.fusion.projector(z_inputs) if z_inputs is not None else None
            judged = self.backbone.answer_margins(
                features | as_inputs([seen[id(r)] for r in shown]), z
            )
        answers = judged.float().cpu().numpy()
        return [
            row_answers[: len(row.pairs)] for row, row_answers in zip(rows, answers, strict=True)
        ]

    def _match_reusing(
        self,
        rows: list["_Row"],
        questions: list[list[tuple[str, int, str]]],
        tasks: dict[int, tuple[Reading, str]],
        seen: dict[int, Seen],
        vectors: Tensor | None,
    ) -> Tensor:
        """Margins from the keys and values of the embedding pass, for models that were trained so."""
        reader = self.backbone.reader
        readings = [reading for reading, _ in tasks.values()]
        batches = (
            [reader.embedding_batch(readings, [task for _, task in tasks.values()])]
            if readings
            else []
        )
        masks = [batch["attention_mask"] for batch in batches]
        *numbers, first, second = token_numbers(
            [*masks, reader.matching_prompts()["attention_mask"]]
        )
        embedded: dict[int, Segment] = {}
        for tokens, (key, (reading, task)) in zip(numbers, tasks.items(), strict=True):
            embedded[key] = replace(reader.embedded(reading, task), source=tokens)
        segments = [
            [embedded[id(r)] if r else None for r in (row.query_reading, *row.readings)]
            for row in rows
        ]
        packed = reader.pack_reuse(segments, questions, (first, second))
        shown = [seen[key] for key in tasks if key in seen]
        features: dict[str, Any] = {
            name: value.to(self.device) for name, value in vars(packed).items()
        }
        features["vectors"] = vectors
        features["parts"] = [
            {name: value.to(self.device) for name, value in batch.items()} for batch in batches
        ]
        features["shown"] = [len(shown)] * len(batches)
        return embed_and_answer(
            self.backbone, self.fusion, features, shown, self.backbone.answer_margins
        )["answers"]  # type: ignore[no-any-return]

    def _vectors(self, inputs: Sequence[Any], task: str) -> list[Tensor]:
        """A vector for each input: as it was passed, or the embedding of the input, each distinct
        object's once.

        The same object gets the same vector, so that pairs of one query are still known by it.
        """
        distinct = {id(value): value for value in inputs}
        if all(isinstance(value, np.ndarray | Tensor) for value in distinct.values()):
            vectors = [torch.as_tensor(value).to(self.device) for value in distinct.values()]
        else:
            vectors = (
                list(self.embed(list(distinct.values()), task).to(self.device)) if distinct else []
            )
        by_id = dict(zip(distinct, vectors, strict=True))
        return [by_id[id(value)] for value in inputs]

    def _see(self, pictures: Pictures) -> list[Seen]:
        return see(self.backbone.base, pictures.to(self.device, self.backbone.model.dtype))


def embed_and_answer(
    backbone: Backbone,
    fusion: MultiTokenFusion,
    features: dict[str, Any],
    seen: list[Seen],
    answer: Callable[..., Tensor],
) -> dict[str, Any]:
    """Embedding and matching in one, the answer slots reading the keys and values that embedding
    left behind.

    Args:
        backbone: Of the model.
        fusion: Of the model.
        features: As for :meth:`~rematch.model.ReMatch.forward`.
        seen: Features of the picture sets in reading order.
        answer: Of the backbone: what is computed at the answer slots.

    Returns:
        ``answers``, and ``multi_vector`` if anything is embedded.
    """
    remaining = iter(seen)
    parts = [
        part | as_inputs([next(remaining) for _ in range(count)])
        for part, count in zip(features["parts"], features["shown"], strict=True)
    ]
    prompts = {
        name: value.to(backbone.model.device)
        for name, value in backbone.reader.matching_prompts().items()
    }
    (*states, last), layers = backbone.embed_keeping([*parts, prompts])
    multi = [
        fusion({"token_embeddings": state, "attention_mask": part["attention_mask"]})[
            "multi_vector"
        ]
        for state, part in zip(states, parts, strict=True)
    ]
    context = features["context"]

    def gathered(tokens: Tensor) -> Tensor:  # (tokens, heads, width) → (b, heads, C, width)
        chosen = tokens.index_select(0, context.flatten())
        return chosen.view(*context.shape, *tokens.shape[1:]).transpose(1, 2)

    cache = KeyValues([(gathered(keys), gathered(values)) for keys, values in layers])
    vectors = (
        fuse(torch.cat(multi))[features["read"]] if "read" in features else features["vectors"]
    )
    z = fusion.projector(vectors) if vectors is not None and len(vectors) else None
    answers = answer(features, z, cache)
    if (
        torch.is_grad_enabled()
    ):  # FSDP2 gathers a layer's weights for the gradient of its output, none otherwise
        answers = answers + 0.0 * last.sum()
    out: dict[str, Any] = {"answers": answers}
    return out | ({"multi_vector": torch.cat(multi)} if multi else {})
