"""Keys and values of one forward pass, reused in another (docs/reuse.md)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat
from transformers import DynamicCache


class KeyValues(DynamicCache):  # type: ignore[misc]
    """A cache that puts given keys and values before a sequence and records the new ones.

    Unlike its base class it makes no copy of the new ones.

    Args:
        before: For every layer, the keys and values of the tokens before the sequence, (B, heads,
            number of tokens before, head width) each.

    Attributes:
        new: For every layer that has run, the keys and values of the sequence.
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
        keys_before, values_before = self.before[layer]
        return cat([keys_before, keys], 2), cat([values_before, values], 2)
