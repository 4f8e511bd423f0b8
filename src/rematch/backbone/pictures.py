"""Pictures of a batch: each is collected once and passes the vision tower once.

A *picture set* holds the pictures of one input, usually a single one. Its :class:`PictureFeatures`
replace ``pixel_values`` wherever the input occurs; the backbone takes them as
``mm_encoder_outputs``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class Pictures:
    """Picture sets as the backbone's processor made them, concatenated.

    Attributes:
        values: ``pixel_values`` and the like of all sets, concatenated along the first dimension.
        sizes: For each value, the number of its rows that belong to each set.
        tokens: Number of visual tokens of each set.
        levels: For each value stored as 8-bit levels (:meth:`compact`), a table of the numbers
            that the levels of each channel stand for, (channels, 256).
    """

    values: dict[str, Tensor]
    sizes: dict[str, list[int]]
    tokens: list[int]
    levels: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collect(cls, visions: Sequence[dict[str, Tensor]], tokens: Sequence[int]) -> "Pictures":
        """Concatenate the pictures of several inputs.

        Values of different shapes, as processors return them that pad in every call, are padded
        with zeros to the same shape.

        Args:
            visions: ``pixel_values`` and the like of each input.
            tokens: Number of visual tokens of each input.
        """
        names = list(visions[0])
        values = {name: _concatenate([vision[name] for vision in visions]) for name in names}
        sizes = {name: [len(vision[name]) for vision in visions] for name in names}
        return cls(values, sizes, list(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Sequence[int]) -> "Pictures":
        """Return the sets with these numbers, in this order."""
        parts = {name: torch.split(value, self.sizes[name]) for name, value in self.values.items()}
        return Pictures(
            {name: torch.cat([part[i] for i in numbers]) for name, part in parts.items()},
            {name: [sizes[i] for i in numbers] for name, sizes in self.sizes.items()},
            [self.tokens[i] for i in numbers],
            self.levels,
        )

    def chunks(self, max_tokens: int) -> list[range]:
        """Split the sets into runs of at most ``max_tokens`` visual tokens.

        A set that is larger than that is a run by itself.

        Returns:
            The numbers of the sets of each run.

        >>> Pictures({}, {}, [3, 3, 9, 1]).chunks(6)
        [range(0, 2), range(2, 3), range(3, 4)]
        """
        runs, start, run_tokens = [], 0, 0
        for i, set_tokens in enumerate(self.tokens):
            if i > start and run_tokens + set_tokens > max_tokens:
                runs.append(range(start, i))
                start, run_tokens = i, 0
            run_tokens += set_tokens
        return [*runs, range(start, len(self.tokens))]

    def compact(
        self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
    ) -> "Pictures":
        """Return the same pictures in less memory.

        Processors map the 256 levels of each colour channel to normalised numbers. If all pixels
        are such numbers, the levels are stored, one byte each, with a table of the exact numbers.
        Other values are stored as ``dtype`` if that is smaller.

        Args:
            mean: Mean of each channel that the processor normalises with.
            std: Standard deviation of each channel that the processor normalises with.
            dtype: The dtype in which the vision tower reads pictures.
        """
        values, levels = {}, {}
        for name, value in self.values.items():
            values[name] = value
            if not value.is_floating_point():
                continue
            encoded = _as_levels(value, mean, std) if name == "pixel_values" else None
            if encoded is not None:
                values[name], levels[name] = encoded
            elif dtype.itemsize < value.dtype.itemsize:
                values[name] = value.to(dtype)
        return Pictures(values, self.sizes, self.tokens, levels)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Pictures":
        """Return the pictures on a device, with levels restored and floats cast to ``dtype``."""
        moved = {}
        for name, value in self.values.items():
            if name in self.levels:
                moved[name] = _from_levels(value.to(device), self.levels[name].to(device, dtype))
            else:
                moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Pictures(moved, self.sizes, self.tokens)


def _by_channel(value: Tensor, channels: int) -> Tensor | None:
    """View flattened patches (N, C · …) or pictures (…, C, H, W) as (N, C, pixels).

    Returns ``None`` for values of another shape.
    """
    if value.ndim == 2 and value.shape[1] % channels == 0:
        return value.view(len(value), channels, -1)
    if value.ndim > 3 and value.shape[-3] == channels:
        return value.reshape(-1, channels, value.shape[-2] * value.shape[-1])
    return None


def _as_levels(
    value: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """Encode normalised pixels as 8-bit levels.

    Returns:
        The levels, uint8 in the shape of ``value``, and a table (channels, 256), from which
        :func:`_from_levels` restores ``value`` exactly; ``None`` if that is impossible.
    """
    pixels = _by_channel(value, len(mean))
    if pixels is None or len(std) != len(mean):
        return None
    shift, scale = (torch.tensor(numbers, dtype=value.dtype)[:, None] for numbers in (mean, std))
    numbers = (pixels * scale + shift) * 255
    if numbers.min() < -0.5 or numbers.max() > 255.5:
        return None
    levels = numbers.round().clamp(0, 255).to(torch.uint8)
    table = torch.zeros(len(mean), 256, dtype=value.dtype)
    for channel, row in enumerate(table):
        row[levels[:, channel].long()] = pixels[:, channel]
    levels = levels.view(value.shape)
    return (levels, table) if torch.equal(_from_levels(levels, table), value) else None


def _from_levels(levels: Tensor, table: Tensor) -> Tensor:
    """Look up the numbers that levels stand for."""
    pixels = _by_channel(levels, len(table))
    assert pixels is not None
    restored = torch.stack(
        [row[pixels[:, channel].long()] for channel, row in enumerate(table)], 1
    )
    return restored.view(levels.shape)


@dataclass
class PictureFeatures:
    """What the vision tower computes for one picture set.

    Attributes:
        units: Features of each picture, or of each of its tiles, (visual tokens, D).
        deepstack: Such features of each further layer that the language model reads (Qwen3-VL).
        stacked: Whether the backbone takes all units as one tensor.
    """

    units: list[Tensor]
    deepstack: list[list[Tensor]]
    stacked: bool


def picture_features(base: nn.Module, pictures: Pictures) -> list[PictureFeatures]:
    """Run the vision tower on picture sets.

    Args:
        base: The backbone without its LM head.
        pictures: Picture sets on the same device.

    Returns:
        The features of each set.
    """
    get_features: Any = base.get_image_features
    output = get_features(**pictures.values, return_dict=True)
    units = list(output.pooler_output)
    stacked = isinstance(output.pooler_output, Tensor)
    levels = [list(level) for level in getattr(output, "deepstack_features", None) or []]
    features, end = [], 0
    for tokens in pictures.tokens:
        start, count = end, 0
        while count < tokens:
            count += len(units[end])
            end += 1
        if count != tokens:
            raise AssertionError(
                f"{type(base).__name__}: {count} visual features for {tokens} picture tokens"
            )
        deepstack = [level[start:end] for level in levels]
        features.append(PictureFeatures(units[start:end], deepstack, stacked))
    return features


def feature_inputs(features: Sequence[PictureFeatures]) -> dict[str, Any]:
    """Return the backbone's keyword arguments for picture sets in reading order."""
    if not features:
        return {}
    units = [unit for picture_set in features for unit in picture_set.units]
    pooled = torch.stack(units) if features[0].stacked else tuple(units)
    output = BaseModelOutputWithPooling(pooler_output=pooled)
    levels = [
        [unit for units in level for unit in units]
        for level in zip(*(picture_set.deepstack for picture_set in features), strict=True)
    ]
    if levels:
        output.deepstack_features = levels
    return {"mm_encoder_outputs": {"image": output}}


def _concatenate(values: list[Tensor]) -> Tensor:
    """Concatenate tensors along the first dimension, padding the others with zeros."""
    shapes = [value.shape[1:] for value in values]
    if len(set(shapes)) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        values = [_zero_padded(value, largest) for value in values]
    return torch.cat(values)


def _zero_padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    padded = value.new_zeros(len(value), *shape)
    padded[(slice(None), *(slice(0, n) for n in value.shape[1:]))] = value
    return padded
