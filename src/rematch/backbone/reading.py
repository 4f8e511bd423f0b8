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
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rematch.backbone.turns import TEXT_FEATURES, Turns
from rematch.data.inputs import as_parts
from rematch.errors import ModelError, RematchError, TooLongError
from rematch.matching import Segment
from rematch.prompts import document_token, query_token


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
        return Segment(ids, self._positions({"input_ids": ids}), is_placeholder=placeholder)

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
        return self.padded(rows)

    def padded(self, rows: Sequence[Segment]) -> dict[str, Tensor]:
        """Segments as a batch, padded on the right, as :meth:`embedding_batch` returns it."""
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
