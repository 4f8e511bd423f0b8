"""One training step, laid out: what the collator hands to the loss."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rematch.backbone.pictures import Pictures


@dataclass
class Step:
    """One forward pass.

    Attributes:
        tensors: The model's inputs but for the pictures.
        sets: Picture sets in reading order, as numbers into :attr:`Batch.pictures`.
        parts: In ``reuse`` mode: the padded batches that are embedded; the step's own tensors are
            then the questions about them, with ``read``, which of the embedded inputs stand in the
            placeholders.
    """

    tensors: dict[str, Tensor]
    sets: list[int] = field(default_factory=list)
    parts: list["Step"] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many inputs it embeds."""
        return sum(part.size for part in self.parts) or len(self.tensors["input_ids"])


@dataclass
class Batch:
    """B samples of C columns (query, positive and, if there are any, negative), made of N distinct
    inputs (in ``reuse`` mode: distinct within a mini-batch).

    Attributes:
        inputs: Which distinct input stands where, (B, C).
        keys: A number per distinct input that is equal where, and only where, inputs are, (N,),
            int64.
        embedding: Forward passes that embed the distinct inputs in their order.
        matching: Forward passes over the matching questions, unless embedding answers them
            (``reuse``). Beside the fields of :class:`~rematch.matching.Packed` their tensors hold
            ``read``, which of the distinct inputs stand in the placeholders, in reading order, and
            ``relevant`` (b, 2): whether a slot's document is the positive.
        pictures: The distinct picture sets; ``None`` without any.
        budget: Tokens of a forward pass; visual ones, when the vision tower runs alone.
        temperatures: τ of each sample's source, (B,); ``None`` for the loss's.
        ids: What the samples are called, for errors.
        skipped: Samples that were left out, each with the reason; others stand in their places.
    """

    inputs: Tensor
    keys: Tensor
    embedding: list[Step]
    matching: list[Step]
    pictures: Pictures | None
    budget: int
    temperatures: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __reduce__(self) -> tuple[Callable[[bytes], "Batch"], tuple[bytes]]:
        """From a data worker a batch comes through the pipe as one string of bytes.

        torch would hand over each of its hundreds of tensors as a file descriptor of shared
        memory, more than many machines allow a process, and more memory than many containers have
        in /dev/shm.
        """
        stream = io.BytesIO()
        _Pickler(stream, protocol=5).dump(
            {item.name: getattr(self, item.name) for item in fields(self)}
        )
        return _unpickle, (stream.getvalue(),)

    @property
    def tokens(self) -> int:
        """Tokens of all its forward passes, padding included."""
        steps = [
            part for step in [*self.embedding, *self.matching] for part in (step, *step.parts)
        ]
        return sum(step.tensors["input_ids"].numel() for step in steps)


class _Pickler(pickle.Pickler):
    """Pickles tensors as the arrays that they hold."""

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
