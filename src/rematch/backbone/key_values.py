"""Keys and values of a forward pass, handed out and put before another (docs/reuse.md)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat
from transformers import DynamicCache


class KeyValues(DynamicCache):  # type: ignore[misc]
    """Hands out the keys and values that a forward pass computes, and puts others before them,
    without extra copies.

    Args:
        before: Keys and values of every layer that stand before the sequence, (B, heads, C, head
            width) each.

    Attributes:
        new: Those of the sequence, layer by layer.
    """

    def __init__(self, before: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self.before = before
        self.new: list[tuple[Tensor, Tensor]] = []

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.new.append((keys, values))
        if not self.before:
            return keys, values
        known_keys, known_values = self.before[layer]
        return cat([known_keys, keys], 2), cat([known_values, values], 2)
