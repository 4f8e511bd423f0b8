"""Inputs as token ids: every input is tokenized once, for embedding and matching alike.

- For embedding, an input stands in the backbone's chat template and ends with the learnable
  tokens. Training tokenizes the rendered turn the way ``encode`` does; loading a backbone checks
  that both read the same tokens (:func:`rematch.backbone.checks.check_reading`).
- For matching, only the content (pictures and text) is a segment of a longer sequence
  (:mod:`rematch.matching`): the tokens of the turn without those that the template writes around
  it.

Shapes: B inputs, L tokens, P position dimensions (1, or 3 for M-RoPE backbones).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rematch.backbone.turns import TEXT_FEATURES, Turns
from rematch.data.inputs import pictures_and_text
from rematch.errors import RematchError, TooLongError
from rematch.matching import Segment
from rematch.prompts import document_token, query_token


@dataclass
class Reading:
    """One tokenized input.

    Attributes:
        ids: Token ids in the chat template, without learnable tokens, (L,).
        positions: Positions of these tokens, starting at 0, (P, L).
        content: The segment of the pictures and the text alone.
        vision: ``pixel_values`` and the like of the pictures, as the backbone takes them; empty
            without pictures.
        visual_tokens: Number of tokens that stand for pictures.
    """

    ids: Tensor
    positions: Tensor
    content: Segment
    vision: dict[str, Tensor] = field(default_factory=dict)
    visual_tokens: int = 0


class Reader:
    """Tokenizes inputs with a backbone's processor.

    Args:
        processor: Processor of the backbone.
        model: The backbone without its LM head; it gives the picture token's id, and the positions
            if it uses M-RoPE.

    Attributes:
        picture_token_id: Id of the token that stands for a part of a picture.
        prefix: What the chat template writes before a text.
        suffix: What the chat template writes after a text.

    Raises:
        ModelError: If the chat template cannot take a user turn of text and a picture.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.picture_token_id: int = (
            getattr(model.config, "image_token_id", None) or model.config.image_token_index
        )
        self._rope_index = getattr(model, "get_rope_index", None)
        self.turns = Turns(processor)
        frame = self.turns.frame(pictures=False, text=True)
        self.prefix, self.suffix = frame.prefix, frame.suffix
        self._learnable_ids: dict[tuple[str, int], list[int]] = {}

    def pictures_and_text(
        self, value: Any, row: int, prompt: str = ""
    ) -> tuple[list[Image.Image], str]:
        """Split an input into pictures and text that holds no control token.

        Args:
            value: An input as for :func:`rematch.data.inputs.pictures_and_text`.
            row: Its row in the batch, for the error.
            prompt: Text put before the text of the input.

        Returns:
            RGB pictures and the text.

        Raises:
            RematchError: If the input is empty or of an unknown kind, a picture cannot be read, or
                the text holds a control token.
        """
        pictures, text = pictures_and_text(value, row)
        text = prompt + text
        self.turns.refuse_control_tokens(text, row)
        return pictures, text

    @contextmanager
    def report_original_rows(self, inputs: Iterable[Any]) -> Iterator[None]:
        """Make errors in the block name an input's row in ``inputs``.

        Without it they would name the row in a batch of inputs that were sorted by length.
        """
        try:
            yield
        except RematchError:
            for row, value in enumerate(inputs):
                self.pictures_and_text(value, row)
            raise

    def read(self, value: Any, row: int = 0) -> Reading:
        """Tokenize one input.

        Args:
            value: An input as for :func:`rematch.data.inputs.pictures_and_text`.
            row: Its row in the batch, for the error.

        Raises:
            RematchError: If the input is empty or of an unknown kind, a picture cannot be read, or
                the text holds a control token.
        """
        pictures, text = self.pictures_and_text(value, row)
        turn = self.turns.render(pictures, text)
        features = self.turns.tokenize(turn, pictures)
        ids, positions = features["input_ids"], self._positions(features)
        frame = self.turns.frame(pictures=bool(pictures), text=bool(text))
        start, stop = len(frame.prefix_ids), len(ids) - len(frame.suffix_ids)
        if ids[:start].tolist() == frame.prefix_ids and ids[stop:].tolist() == frame.suffix_ids:
            content = Segment(ids[start:stop], positions[:, start:stop] - start)
        else:
            # a token spans the border of content and template, as a leading line break may cause
            content_text = turn.removeprefix(frame.prefix).removesuffix(frame.suffix)
            alone = self.turns.tokenize(content_text, pictures, bare=True)
            content = Segment(alone["input_ids"], self._positions(alone))
        vision = {name: value for name, value in features.items() if name not in TEXT_FEATURES}
        visual_tokens = int((ids == self.picture_token_id).sum())
        return Reading(ids, positions, content, vision, visual_tokens)

    def text_segment(
        self, text: str, *, placeholder: bool = False, opening: bool = False
    ) -> Segment:
        """Tokenize a text as a segment.

        Args:
            text: The text; may be empty.
            placeholder: Whether a placeholder for ``Z*`` follows the text.
            opening: Whether the segment opens the sequence, so that BOS comes first if the model
                has one.
        """
        token_ids: list[int] = []
        if opening:
            token_ids = self.turns.opening_ids(text)
        elif text:
            token_ids = self.turns.token_ids(text)
        if placeholder:
            token_ids = [*token_ids, self.tokenizer.eos_token_id]
        ids = torch.tensor(token_ids, dtype=torch.long)
        return Segment(ids, self._positions({"input_ids": ids}), is_placeholder=placeholder)

    def prepend(self, head: Segment, content: Segment) -> Segment:
        """Return a segment of a head, such as "Query:", and the content after it."""
        positions = torch.cat([head.positions, content.positions + head.end], dim=1)
        return Segment(torch.cat([head.ids, content.ids]), positions)

    def with_learnable_tokens(self, reading: Reading, task: str) -> Segment:
        """Return what the backbone reads to embed an input.

        Args:
            reading: The input.
            task: ``"query"`` or ``"document"``, whose learnable tokens follow the input.
        """
        learnable = torch.tensor(self.learnable_ids(task), dtype=torch.long)
        start = int(reading.positions.max()) + 1
        positions = (start + torch.arange(len(learnable))).expand(len(reading.positions), -1)
        return Segment(
            torch.cat([reading.ids, learnable]), torch.cat([reading.positions, positions], dim=1)
        )

    def learnable_ids(self, task: str) -> list[int]:
        """Return the ids of the learnable tokens for ``task``, ``"query"`` or ``"document"``."""
        key = task, len(self.tokenizer)
        if key not in self._learnable_ids:
            name = query_token if task == "query" else document_token
            vocabulary = self.tokenizer.get_added_vocab()
            self._learnable_ids[key] = [
                vocabulary[name(i)] for i in range(len(vocabulary)) if name(i) in vocabulary
            ]
        return self._learnable_ids[key]

    def embedding_batch(
        self, readings: Sequence[Reading], tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        """Pad readings with the learnable tokens of their tasks to a batch.

        Args:
            readings: B inputs.
            tasks: ``"query"`` or ``"document"`` for each input.

        Returns:
            ``input_ids`` (B, L), ``attention_mask`` (B, L) and ``position_ids`` (B, L) or
            (3, B, L), padded on the right; no pictures.

        Raises:
            TooLongError: If an input is longer than the model takes.
        """
        rows = [
            self.with_learnable_tokens(reading, task)
            for reading, task in zip(readings, tasks, strict=True)
        ]
        lengths = [len(row.ids) for row in rows]
        if max(lengths) > self.tokenizer.model_max_length:
            raise too_long_error(lengths.index(max(lengths)), self.tokenizer.model_max_length)
        return self.pad(rows)

    def pad(self, rows: Sequence[Segment]) -> dict[str, Tensor]:
        """Pad segments on the right to a batch, as :meth:`embedding_batch` returns it."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(rows[0].positions.shape[0], len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, 1
            positions[:, i, : len(row.ids)] = row.positions
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions[0] if len(positions) == 1 else positions,
        }

    def decode(self, ids: Tensor) -> str:
        """Return tokens as text, with every run of picture tokens shortened to one."""
        tokens: list[int] = []
        for is_picture, run in groupby(ids.tolist(), lambda token: token == self.picture_token_id):
            tokens += [self.picture_token_id] if is_picture else run
        return str(self.tokenizer.decode(tokens))

    def _positions(self, features: dict[str, Tensor]) -> Tensor:
        """Positions of a sequence, starting at 0, (P, L)."""
        ids, token_types = features["input_ids"], features.get("mm_token_type_ids")
        plain = torch.arange(len(ids))[None]
        if self._rope_index is None:
            return plain
        if token_types is None or not token_types.any():
            return plain.expand(3, -1)
        positions: Tensor = self._rope_index(
            ids[None], token_types[None], image_grid_thw=features["image_grid_thw"]
        )[0]
        return positions[:, 0]


def too_long_error(row: int, limit: int) -> TooLongError:
    """Return the error for an input that is longer than the model takes."""
    return TooLongError(
        f"input {row}: longer than the {limit} tokens that the model takes, pictures included. "
        "Shorten the text, use fewer or smaller pictures, or raise max_seq_length."
    )
