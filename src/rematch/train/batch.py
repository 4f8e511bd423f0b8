"""The samples of one step, laid out as mini-batches: what the collator hands to the loss."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rematch.backbone.pictures import Pictures


@dataclass
class MiniBatch:
    """What one forward pass computes.

    Attributes:
        tensors: Inputs of the model, without pictures.
        picture_sets: Its picture sets in reading order, as numbers into :attr:`Batch.pictures`.
        parts: In ``reuse`` mode: the padded batches to embed; the tensors are then the questions
            about their inputs.
    """

    tensors: dict[str, Tensor]
    picture_sets: list[int] = field(default_factory=list)
    parts: list["MiniBatch"] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many inputs it embeds."""
        if self.parts:
            return sum(part.size for part in self.parts)
        return len(self.tensors["input_ids"])

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass, padding included."""
        return self.tensors["input_ids"].numel() + sum(part.tokens for part in self.parts)


@dataclass
class Batch:
    """B samples of C columns (query, positive and perhaps negative), made of N distinct inputs.

    In ``reuse`` mode inputs are distinct within a mini-batch only.

    Attributes:
        inputs: The number of the distinct input in each place, (B, C).
        keys: A number for each distinct input, equal where inputs are equal, (N,), int64.
        embedding: Mini-batches that embed the distinct inputs in order.
        matching: Mini-batches of questions; none in ``reuse`` mode, where the embedding pass
            answers them. Beside the fields of :class:`~rematch.matching.Packed` their tensors
            hold ``placeholder_inputs``, the distinct inputs that stand in the placeholders in
            reading order; and ``relevant``, whether a slot's document is the positive, (b, 2).
        pictures: The distinct picture sets; ``None`` if there are none.
        batch_tokens: Tokens of a forward pass; visual tokens where the vision tower runs alone.
        temperatures: τ of each sample's source, (B,); ``None`` for the τ of the loss.
        ids: Names of the samples, for errors.
        skipped: Samples that were left out, each with the reason; others replace them.
    """

    inputs: Tensor
    keys: Tensor
    embedding: list[MiniBatch]
    matching: list[MiniBatch]
    pictures: Pictures | None
    batch_tokens: int
    temperatures: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __reduce__(self) -> tuple[Callable[[bytes], "Batch"], tuple[bytes]]:
        """Pickle to one string of bytes, for the pipe from a data worker.

        torch would pass each of the hundreds of tensors as a file descriptor of shared memory:
        more than many machines allow a process, and more memory than many containers have in
        /dev/shm.
        """
        stream = io.BytesIO()
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        _Pickler(stream, protocol=5).dump(values)
        return _unpickle, (stream.getvalue(),)

    @property
    def tokens(self) -> int:
        """Tokens of all its forward passes, padding included."""
        return sum(mini_batch.tokens for mini_batch in [*self.embedding, *self.matching])


class _Pickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype == torch.bfloat16:  # NumPy has no such type
                return _bfloat16, (value.view(torch.int16).numpy(),)
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _bfloat16(bits: Any) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def _unpickle(content: bytes) -> Batch:
    return Batch(**pickle.loads(content))
