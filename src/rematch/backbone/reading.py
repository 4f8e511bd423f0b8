"""Inputs as token ids: every input is read once, and serves embedding and matching alike.

- For embedding, an input stands in the backbone's chat template and ends with the learnable
  tokens. Training tokenizes the rendered turn as ``encode`` does, so that both read the same
  tokens; loading a backbone checks it.
- For matching, only its content (pictures and text) is a segment of a longer sequence
  (:mod:`rematch.matching`): the tokens of the turn without those that the template writes around
  it.

Shapes: L tokens, P position dimensions (1, or 3 for M-RoPE backbones).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rematch.backbone.turns import TEXT_FEATURES, Turns
from rematch.data.inputs import as_parts
from rematch.errors import ModelError, RematchError, TooLongError
from rematch.matching import (
    Packed,
    Segment,
    lay_out,
    lay_out_behind,
    lay_out_prefix,
    lay_out_reuse,
    pack,
)
from rematch.prompts import (
    MATCH_DOCUMENT,
    MATCH_QUERY,
    MATCH_QUESTION,
    MATCH_TASK,
    document_token,
    query_token,
)


@dataclass
class Reading:
    """One input, tokenized.

    Attributes:
        ids: In the chat template, without learnable tokens, (L,).
        positions: From 0, (P, L).
        content: Its pictures and text alone.
        vision: ``pixel_values`` and the like of its pictures, as the backbone takes them; empty
            without pictures.
        visual_tokens: How many of its tokens stand for pictures.
    """

    ids: Tensor
    positions: Tensor
    content: Segment
    vision: dict[str, Tensor] = field(default_factory=dict)
    visual_tokens: int = 0


class Reader:
    """Tokenizes with a backbone's processor.

    Args:
        processor: Of the backbone.
        model: The backbone without its LM head; it knows the picture token, and M-RoPE positions
            where it has them.

    Raises:
        ModelError: If the chat template cannot take a user turn of text and a picture.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.picture_token: int = (
            getattr(model.config, "image_token_id", None) or model.config.image_token_index
        )
        self._rope_index = getattr(model, "get_rope_index", None)
        self.turns = Turns(processor)
        self.prefix, self.suffix = (
            self.turns.frames[False, True].prefix,
            self.turns.frames[False, True].suffix,
        )
        self._learnable: dict[tuple[str, int], list[int]] = {}

    def parts(self, value: Any, row: int, prompt: str = "") -> tuple[list[Image.Image], str]:
        """:func:`~rematch.data.inputs.as_parts`, without text that the model would read as
        anything but text.

        Args:
            value: As for :func:`~rematch.data.inputs.as_parts`.
            row: Where it stands in the batch, for the error.
            prompt: Put before the text.

        Raises:
            RematchError: As there, and as for
                :meth:`~rematch.backbone.turns.Turns.refuse_control_tokens`.
        """
        pictures, text = as_parts(value, row)
        text = prompt + text
        self.turns.refuse_control_tokens(text, row)
        return pictures, text

    @contextmanager
    def own_numbers(self, inputs: Iterable[Any]) -> Iterator[None]:
        """Errors number inputs as they are given here, not by their place in a batch of sorted
        ones.
        """
        try:
            yield
        except RematchError:
            for row, value in enumerate(inputs):
                self.parts(value, row)
            raise

    def read(self, value: Any, row: int = 0) -> Reading:
        """Tokenize one input.

        Args:
            value: As for :func:`~rematch.data.inputs.as_parts`.
            row: Where it stands in the batch, for the error.

        Raises:
            RematchError: If it is empty, no query or document, a picture cannot be read, or its
                text holds a control token.
        """
        pictures, text = self.parts(value, row)
        turn = self.turns.render(pictures, text)
        whole = self.turns.tokenize(turn, pictures)
        ids, positions = whole["input_ids"], self._positions(whole)
        frame = self.turns.frames[bool(pictures), bool(text)]
        start, stop = len(frame.prefix_ids), len(ids) - len(frame.suffix_ids)
        if ids[:start].tolist() == frame.prefix_ids and ids[stop:].tolist() == frame.suffix_ids:
            content = Segment(ids[start:stop], positions[:, start:stop] - start)
        else:  # content and template share a token at the border, as a leading line break may: tokenized apart
            alone = self.turns.tokenize(
                turn.removeprefix(frame.prefix).removesuffix(frame.suffix), pictures, bare=True
            )
            content = Segment(alone["input_ids"], self._positions(alone))
        vision = {name: value for name, value in whole.items() if name not in TEXT_FEATURES}
        return Reading(ids, positions, content, vision, int((ids == self.picture_token).sum()))

    def text_segment(
        self, text: str, *, placeholder: bool = False, opening: bool = False
    ) -> Segment:
        """A segment of text alone; with a placeholder for ``Z*`` at its end; or the one that opens
        the sequence.
        """
        text_ids = (
            self.turns.opening_ids(text) if opening else self.turns.ids(text) if text else []
        )
        ids = torch.tensor(
            text_ids + [self.tokenizer.eos_token_id] * placeholder, dtype=torch.long
        )
        return Segment(ids, self._positions({"input_ids": ids}), is_feature=placeholder)

    def headed(self, head: Segment, content: Segment) -> Segment:
        """The content with a head ("Query:") before it."""
        positions = torch.cat([head.positions, content.positions + head.end], dim=1)
        return Segment(torch.cat([head.ids, content.ids]), positions)

    def embedding_batch(
        self, readings: Sequence[Reading], tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        """Readings with the learnable tokens of their task (``"query"`` or ``"document"``), padded
        on the right.

        Returns:
            ``input_ids`` (B, L), ``attention_mask`` (B, L), ``position_ids`` (B, L) or (3, B, L);
            without pictures.

        Raises:
            RematchError: If an input is longer than the model takes.
        """
        rows = [
            self.embedded(reading, task) for reading, task in zip(readings, tasks, strict=True)
        ]
        longest = max(len(row.ids) for row in rows)
        if longest > self.tokenizer.model_max_length:
            raise too_long(
                max(range(len(rows)), key=lambda i: len(rows[i].ids)),
                self.tokenizer.model_max_length,
            )
        return self._padded(rows)

    def _padded(self, rows: Sequence[Segment]) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(rows[0].positions.shape[0], len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, 1
            positions[:, i, : len(row.ids)] = row.positions
        plain = positions[0] if len(positions) == 1 else positions
        return {"input_ids": ids, "attention_mask": mask, "position_ids": plain}

    def embedded(self, reading: Reading, task: str) -> Segment:
        """What the backbone reads to embed an input: the reading, and the learnable tokens of
        ``task``.
        """
        tail = torch.tensor(self.learnable_ids(task), dtype=torch.long)
        after = (int(reading.positions.max()) + 1 + torch.arange(len(tail))).expand(
            len(reading.positions), -1
        )
        return Segment(
            torch.cat([reading.ids, tail]), torch.cat([reading.positions, after], dim=1)
        )

    def pack_matching(
        self,
        rows: Sequence[tuple[Reading | None, Sequence[Reading | None]]],
        questions: Sequence[Sequence[tuple[str, int, str]]],
    ) -> tuple[Packed, list[Reading]]:
        """Lay out matching questions; needs no forward pass, so data workers can do it.

        Args:
            rows: For each sequence the query and the documents; ``None`` for one that only has a
                ``feat`` view.
            questions: For each sequence the (query view, document index, document view) of every
                answer slot. Views are laid out if a question asks for them.

        Returns:
            The packed sequences, and the readings whose pictures they show, in order.
        """
        prompt = self.text_segment(self.prefix + MATCH_TASK, opening=True)
        slot = self.text_segment(MATCH_QUESTION + self.suffix)
        heads = [self.text_segment(head) for head in (MATCH_QUERY, MATCH_DOCUMENT)]
        feats = [
            self.text_segment(head, placeholder=True) for head in (MATCH_QUERY, MATCH_DOCUMENT)
        ]
        shown: list[Reading] = []

        def views(wanted: set[str], value: Reading | None, kind: int) -> dict[str, Segment]:
            found = {}
            if "raw" in wanted and value is not None:
                found["raw"] = self.headed(heads[kind], value.content)
                shown.extend([value] * bool(value.vision))
            return found | ({"feat": feats[kind]} if "feat" in wanted else {})

        sequences = []
        for (query, documents), asked in zip(rows, questions, strict=True):
            queries = views({q for q, _, _ in asked}, query, 0)
            others = [
                views({d for _, i, d in asked if i == j}, value, 1)
                for j, value in enumerate(documents)
            ]
            sequences.append(lay_out(prompt, queries, others, slot, asked, feats[0].end))
        return pack(sequences, int(self.tokenizer.pad_token_id or 0)), shown

    def pack_prefix(self, query: Reading | None) -> tuple[Packed, list[Segment]]:
        """What all questions about a query have in common, to be run once.

        Args:
            query: Of a ``raw`` view; ``None`` for its vector.

        Returns:
            The packed sequence, and its segments with the numbers of their tokens as ``source``.
        """
        prompt, head, document = self._prompt_and_heads()
        feat = self.text_segment(MATCH_QUERY, placeholder=True)
        view = feat if query is None else self.headed(head, query.content)
        segments = lay_out_prefix(prompt, view, document, feat.end, query is not None)
        packed = pack([segments], int(self.tokenizer.pad_token_id or 0))
        numbers = torch.split(
            torch.arange(packed.input_ids.shape[1]), [len(s.ids) for s in segments]
        )
        return packed, [replace(s, source=n) for s, n in zip(segments, numbers, strict=True)]

    def pack_behind(
        self, prefix: Sequence[Segment], rows: Sequence[Sequence[Reading | None]]
    ) -> Packed:
        """Documents and their questions behind a prefix.

        Args:
            prefix: Of :meth:`pack_prefix`.
            rows: The documents of each sequence; ``None`` for a vector.
        """
        slot, feat = (
            self.text_segment(MATCH_QUESTION + self.suffix),
            self.text_segment("", placeholder=True),
        )
        sequences = [
            lay_out_behind(prefix, [feat if d is None else d.content for d in ds], slot)
            for ds in rows
        ]
        return pack(sequences, int(self.tokenizer.pad_token_id or 0))

    def matching_prompts(self) -> dict[str, Tensor]:
        """The prompt and the head of a query's vector, the prompt and the head of a document's:
        what all questions that are answered from the embedding pass have in common, to be run once
        with it; padded, as :meth:`embedding_batch`.
        """
        prompt, *heads = self._prompt_and_heads()
        rows = [self.headed(prompt, head) for head in heads]
        return self._padded(rows)

    def pack_reuse(
        self,
        rows: Sequence[Sequence[Segment | None]],
        questions: Sequence[Sequence[tuple[str, int, str]]],
        prompts: Sequence[Tensor],
    ) -> Packed:
        """Lay out questions that are answered from the embedding pass
        (:func:`~rematch.matching.lay_out_reuse`).

        Args:
            rows: For each sequence the query and the documents as they are embedded, with their
                ``source``.
            questions: As for :meth:`pack_matching`.
            prompts: Numbers of the tokens of both rows of :meth:`matching_prompts`.
        """
        prompt, *heads = self._prompt_and_heads()
        size = len(prompt.ids)
        known = replace(prompt, source=prompts[0][:size])
        query, document = (
            replace(head, source=numbers[size:])
            for head, numbers in zip(heads, prompts, strict=True)
        )
        feat, slot = self.text_segment("", placeholder=True), self.text_segment(self.suffix)
        sequences = [
            lay_out_reuse(known, (query, document), embedded, feat, slot, asked)
            for embedded, asked in zip(rows, questions, strict=True)
        ]
        return pack(sequences, int(self.tokenizer.pad_token_id or 0))

    def _prompt_and_heads(self) -> list[Segment]:
        prompt = self.text_segment(self.prefix + MATCH_TASK, opening=True)
        return [prompt, *(self.text_segment(head) for head in (MATCH_QUERY, MATCH_DOCUMENT))]

    def matching_overhead(self) -> tuple[int, int]:
        """Tokens of a packed sequence beside contents: for its query, and for each document with
        its question.
        """
        prompt, *heads = (len(segment.ids) for segment in self._prompt_and_heads())
        slot = self.text_segment(MATCH_QUESTION + self.suffix)
        return 2 * prompt + heads[0], heads[1] + len(slot.ids)

    def learnable_ids(self, task: str) -> list[int]:
        """Token ids of the learnable tokens for ``task``, ``"query"`` or ``"document"``."""
        key = task, len(self.tokenizer)
        if key not in self._learnable:
            name = query_token if task == "query" else document_token
            vocabulary = self.tokenizer.get_added_vocab()
            self._learnable[key] = [
                vocabulary[name(i)] for i in range(len(vocabulary)) if name(i) in vocabulary
            ]
        return self._learnable[key]

    def check(self, name: str, encode: Callable[[Any, str], dict[str, Any]]) -> None:
        """Training must read what ``encode`` reads; tried with text, a picture, and both.

        Args:
            name: Of the backbone, for the error.
            encode: The features of an input and a task, as ``encode`` has them.

        Raises:
            ModelError: If token ids or the shapes of pictures differ; it shows both.
        """
        picture = Image.new("RGB", (64, 64), "white")
        trials = [
            ("query", "word"),
            *(("document", x) for x in ("word", picture, {"text": "word", "image": picture})),
        ]
        for task, value in trials:
            reading, features = self.read(value), encode(value, task)
            in_training, encoded = self.embedded(reading, task).ids, features["input_ids"][0]
            shapes = {key: tuple(pixels.shape) for key, pixels in reading.vision.items()}
            encoded_shapes = {key: tuple(features[key].shape) for key in shapes if key in features}
            if in_training.tolist() != encoded.tolist() or shapes != encoded_shapes:
                sizes = f" ({shapes} against {encoded_shapes})" if shapes != encoded_shapes else ""
                raise ModelError(
                    f"{name}: training would read a {task} as {self.describe(in_training)!r}, but "
                    f"encode reads {self.describe(encoded)!r}{sizes}. Its chat template, "
                    "tokenizer or processing_kwargs depend on how they are called: use a template "
                    "that puts the same around every input, or another backbone."
                )

    def describe(self, ids: Tensor) -> str:
        """Tokens as text, a run of picture tokens as one."""
        runs = groupby(ids.tolist(), lambda token: token == self.picture_token)
        shown = [
            token
            for is_picture, run in runs
            for token in ([self.picture_token] if is_picture else run)
        ]
        return str(self.tokenizer.decode(shown))

    def _positions(self, tokens: dict[str, Tensor]) -> Tensor:
        """Positions from 0, (P, L)."""
        ids, kinds = tokens["input_ids"], tokens.get("mm_token_type_ids")
        plain = torch.arange(len(ids))[None]
        if self._rope_index is None:
            return plain
        if kinds is None or not kinds.any():
            return plain.expand(3, -1)
        positions: Tensor = self._rope_index(
            ids[None], kinds[None], image_grid_thw=tokens["image_grid_thw"]
        )[0]
        return positions[:, 0]


def too_long(row: int, limit: int) -> TooLongError:
    """The error for an input that does not fit into the model."""
    return TooLongError(
        f"input {row}: longer than the {limit} tokens that the model takes, pictures included. "
        "Shorten the text, use fewer or smaller pictures, or raise max_seq_length."
    )
