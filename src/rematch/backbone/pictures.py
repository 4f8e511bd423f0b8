"""Pictures of a batch: each is collected once and passes the vision tower once.

A *set* is the pictures of one input, usually one. Its :class:`PictureFeatures` replace
``pixel_values`` wherever the input occurs: the backbone takes them as ``mm_encoder_outputs``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class Pictures:
    """Picture sets as the backbone's processor made them, one after the other.

    Attributes:
        values: ``pixel_values`` and the like of all sets, concatenated along the first dimension.
        sizes: How many rows of each value belong to each set.
        tokens: Visual tokens of each set.
        levels: For values stored as 8-bit levels (:meth:`compact`), the number that each level of
            each channel stands for, (channels, 256).
    """

    values: dict[str, Tensor]
    sizes: dict[str, list[int]]
    tokens: list[int]
    levels: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collect(cls, visions: Sequence[dict[str, Tensor]], tokens: Sequence[int]) -> "Pictures":
        """Several sets as one; those of other shapes (processors pad per call) are padded with
        zeros alike.
        """
        names = list(visions[0])
        values = {name: _cat([vision[name] for vision in visions]) for name in names}
        sizes = {name: [len(vision[name]) for vision in visions] for name in names}
        return cls(values, sizes, list(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, which: Sequence[int]) -> "Pictures":
        """Some of the sets, in the order asked for."""
        parts = {name: torch.split(value, self.sizes[name]) for name, value in self.values.items()}
        return Pictures(
            {name: torch.cat([part[i] for i in which]) for name, part in parts.items()},
            {name: [sizes[i] for i in which] for name, sizes in self.sizes.items()},
            [self.tokens[i] for i in which],
            self.levels,
        )

    def chunks(self, tokens: int) -> list[range]:
        """Runs of sets that hold at most so many visual tokens, or a single larger set.

        >>> Pictures({}, {}, [3, 3, 9, 1]).chunks(6)
        [range(0, 2), range(2, 3), range(3, 4)]
        """
        found, start, filled = [], 0, 0
        for i, own in enumerate(self.tokens):
            if i > start and filled + own > tokens:
                found.append(range(start, i))
                start, filled = i, 0
            filled += own
        return [*found, range(start, len(self.tokens))]

    def compact(
        self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
    ) -> "Pictures":
        """The same pictures in less memory.

        Processors map the 256 levels of each colour channel to normalised numbers. Where all
        numbers of a value are such, the levels are stored, one byte each, with a table of the very
        numbers. Other values are stored in ``dtype`` if that is smaller.

        Args:
            mean: Of each channel, as the processor normalises.
            std: Likewise.
            dtype: In which the vision tower reads them.
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

    def to(self, device: Any, dtype: torch.dtype) -> "Pictures":
        """On a device, floating-point values and levels as ``dtype``."""
        moved = {}
        for name, value in self.values.items():
            if name in self.levels:
                moved[name] = _from_levels(value.to(device), self.levels[name].to(device, dtype))
            else:
                moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Pictures(moved, self.sizes, self.tokens)


def _by_channel(value: Tensor, channels: int) -> Tensor | None:
    """A view with the channels second: (N, C, …) patches that were flattened, or pictures (…, C,
    H, W).
    """
    if value.ndim == 2 and value.shape[1] % channels == 0:
        return value.view(len(value), channels, -1)
    if value.ndim > 3 and value.shape[-3] == channels:
        return value.reshape(-1, channels, value.shape[-2] * value.shape[-1])
    return None


def _as_levels(
    value: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """(levels, table) from which :func:`_from_levels` restores ``value`` to the bit; ``None`` if
    there is no such.
    """
    parts = _by_channel(value, len(mean))
    if parts is None or len(std) != len(mean):
        return None
    shift, scale = (torch.tensor(numbers, dtype=value.dtype)[:, None] for numbers in (mean, std))
    numbers = (parts * scale + shift) * 255
    if numbers.min() < -0.5 or numbers.max() > 255.5:
        return None
    codes = numbers.round().clamp(0, 255).to(torch.uint8)
    table = torch.zeros(len(mean), 256, dtype=value.dtype)
    for channel, row in enumerate(table):
        row[codes[:, channel].long()] = parts[:, channel]
    codes = codes.view(value.shape)
    return (codes, table) if torch.equal(_from_levels(codes, table), value) else None


def _from_levels(codes: Tensor, table: Tensor) -> Tensor:
    parts = _by_channel(codes, len(table))
    assert parts is not None
    restored = torch.stack([row[parts[:, channel].long()] for channel, row in enumerate(table)], 1)
    return restored.view(codes.shape)


@dataclass
class PictureFeatures:
    """What the vision tower computes for one set.

    Attributes:
        units: Features of each picture, or of each of its tiles, (visual tokens, D).
        deepstack: The same for each further layer that the language model reads (Qwen3-VL).
        stacked: Whether the backbone takes all units as one tensor.
    """

    units: list[Tensor]
    deepstack: list[list[Tensor]]
    stacked: bool


def picture_features(base: nn.Module, pictures: Pictures) -> list[PictureFeatures]:
    """Run the vision tower on picture sets.

    Args:
        base: The backbone without its LM head.
        pictures: The sets, on its device.

    Returns:
        The features of each set.
    """
    get_features: Any = base.get_image_features
    out = get_features(**pictures.values, return_dict=True)
    units = list(out.pooler_output)
    levels = [list(level) for level in getattr(out, "deepstack_features", None) or []]
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
        stacked = isinstance(out.pooler_output, Tensor)
        features.append(PictureFeatures(units[start:end], deepstack, stacked))
    return features


def feature_inputs(features: Sequence[PictureFeatures]) -> dict[str, Any]:
    """Keyword arguments of the backbone that stand for the sets, in reading order."""
    if not features:
        return {}
    units = [unit for picture_set in features for unit in picture_set.units]
    pooled = torch.stack(units) if features[0].stacked else tuple(units)
    out = BaseModelOutputWithPooling(pooler_output=pooled)
    levels = [
        [unit for units in level for unit in units]
        for level in zip(*(picture_set.deepstack for picture_set in features), strict=True)
    ]
    if levels:
        out.deepstack_features = levels
    return {"mm_encoder_outputs": {"image": out}}


def _cat(values: list[Tensor]) -> Tensor:
    shapes = [value.shape[1:] for value in values]
    if len(set(shapes)) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = []
        for value in values:
            whole = value.new_zeros(len(value), *largest)
            whole[(slice(None), *(slice(0, n) for n in value.shape[1:]))] = value
            padded.append(whole)
        values = padded
    return torch.cat(values)
