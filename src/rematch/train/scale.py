"""Learning rates in proportion to the scale of weights, and how far weights have moved.

AdamW moves every element by about the learning rate, whatever its size. The learnable tokens and
the projector start at the scale of the word embeddings. In some backbones that is a hundred times
the scale of the other weights, and at the same learning rate they would hardly move. Here the
learning rate of such a part is multiplied by its RMS over the *reference*, the median RMS of the
decoder's linear weights, so that a step moves it by the same share of its size as the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rematch.backbone.lora import adapters, learnable_rows, linear_layers
from rematch.model import ReMatch
from rematch.train.parallel import of_first_process

DEFAULT_RANGE = 0.02  # of weights, where neither they nor the config tell


@dataclass(frozen=True)
class Rows:
    """A parameter, or some rows of it.

    It is looked up on each use: FSDP2 puts a sharded parameter in the place of the first one.

    Attributes:
        module: The module that has the parameter.
        name: Name of the parameter in the module.
        ids: Indices of the rows; ``None`` for all.
    """

    module: nn.Module
    name: str = "weight"
    ids: tuple[int, ...] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, with all its rows."""
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    def gather(self) -> Tensor:
        """A copy of the rows on the CPU, in float32 or better; all processes must call it."""
        values = _unsharded(self.parameter)
        if self.ids is not None:
            values = values[list(self.ids)]
        return _on_cpu(values).clone()

    def shard(self) -> tuple[Tensor, Tensor]:
        """The parameter's part in this process, and the indices of the rows in that part."""
        part, first = self.parameter.detach(), 0
        if isinstance(part, DTensor):
            first = part.__create_chunk_list__()[0].offsets[0]  # type: ignore[no-untyped-call]
            part = part.to_local()
        ids = range(first, first + len(part)) if self.ids is None else self.ids
        inside = [i - first for i in ids if first <= i < first + len(part)]
        return part, torch.tensor(inside, dtype=torch.long, device=part.device)


def scaled_parts(model: ReMatch) -> dict[str, list[Rows]]:
    """What gets a learning rate of its own: the learnable tokens and each layer of the projector.

    The RMS of the first of the rows is the scale of the part.
    """
    parts = {}
    reader, embedding = model.backbone.reader, model.backbone.model.get_input_embeddings()
    ids = reader.learnable_ids("query") + reader.learnable_ids("document")
    adapter_rows = learnable_rows(model.backbone.model)
    if adapter_rows is not None:
        parts["tokens"] = [Rows(adapter_rows, name) for name in adapter_rows]
    elif ids:
        parts["tokens"] = [Rows(embedding, ids=tuple(ids))]
    projector = model.fusion.projector
    for name, layer in (("projector_1", projector.linear_1), ("projector_2", projector.linear_2)):
        parts[name] = [Rows(layer), Rows(layer, "bias")]
    return parts


def measure(model: ReMatch) -> dict[str, float]:
    """RMS of the word embeddings (``words``), of each scaled part, and the ``reference``.

    All processes get the figures of the first one: with FSDP's ``cpu_ram_efficient_loading`` only
    that one has loaded the weights.
    """
    reader, tokenizer = model.backbone.reader, model.backbone.tokenizer
    learnable = reader.learnable_ids("query") + reader.learnable_ids("document")
    embedding = model.backbone.model.get_input_embeddings().weight.detach()
    scales = {"words": _rms(embedding[: len(tokenizer) - len(learnable)])}
    scales |= {name: _rms(rows[0].gather()) for name, rows in scaled_parts(model).items()}
    layers = linear_layers(model.backbone.model.get_decoder().layers)
    scales["reference"] = median(_linear_rms(layer, model) for layer in layers)
    shared = of_first_process(list(scales.values()), model.device)
    return dict(zip(scales, shared, strict=True))


def rate_factors(scales: dict[str, float]) -> dict[str, float]:
    """What the learning rate of each scaled part is multiplied by."""
    parts = scales.keys() - {"words", "reference"}
    return {name: scales[name] / scales["reference"] for name in scales if name in parts}


class ScaledSteps:
    """Multiplies the learning rate of rows in every step of an AdamW optimizer.

    Rows of a tied embedding cannot be a parameter group of their own. So the optimizer steps from
    zero, which leaves the step itself, and that is multiplied and added to the rows. The result is
    that of a group with the multiplied learning rate, weight decay included, and nothing needs to
    be kept from one step to the next.

    Args:
        optimizer: The optimizer.
        factors: Rows of its parameters, and what to multiply their learning rate by.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factors: Sequence[tuple[Rows, float]]
    ) -> None:
        self._factors = factors
        # of each: factor, parameter, its part here, indices of the rows in that, their values
        self._before: list[tuple[float, nn.Parameter, Tensor, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._set_to_zero)
        optimizer.register_step_post_hook(self._add_to_rows)

    @torch.no_grad()
    def _set_to_zero(self, *_: Any) -> None:
        self._before = []
        for rows, factor in self._factors:
            if rows.parameter.grad is None:  # the optimizer leaves it alone
                continue
            part, ids = rows.shard()
            self._before.append((factor, rows.parameter, part, ids, part[ids]))
            part[ids] = 0

    @torch.no_grad()
    def _add_to_rows(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for factor, parameter, part, ids, before in self._before:
            group = groups[id(parameter)]
            decay = factor * group["lr"] * group["weight_decay"]
            part[ids] = before * (1 - decay) + factor * part[ids]


class Movement:
    """How far weights have moved since this object was made, relative to their size then.

    Args:
        model: The model before the run. A resumed run builds it again from the seed and then loads
            the checkpoint, so the start needs no file.
        trains_projector: Whether the loss has a gradient for the projector.
    """

    def __init__(self, model: ReMatch, *, trains_projector: bool) -> None:
        parts = scaled_parts(model)
        self._rows = {"moved_tokens": parts.get("tokens", [])}
        if trains_projector:
            self._rows["moved_projector"] = [parts["projector_1"][0], parts["projector_2"][0]]
        layers = model.backbone.model.get_decoder().layers
        middle = layers[len(layers) // 2]
        self._adapters = [
            (layer, _linear_rms(layer.get_base_layer(), model) * math.sqrt(_size(layer)))
            for layer in adapters(middle)
        ]
        if not self._adapters:
            self._rows["moved_model"] = [Rows(layer) for layer in linear_layers(middle)]
        self._start = {name: [r.gather() for r in rows] for name, rows in self._rows.items()}

    def shares(self) -> dict[str, float]:
        """‖w - w_start‖ / ‖w_start‖ of what trains, averaged over the matrices of a part.

        Returns:
            ``moved_tokens``; ``moved_projector``; and ``moved_model``, of the linear weights of
            the middle decoder layer. With LoRA the last is the size of the adapter's change.
        """
        moved = {
            name: [
                float((r.gather() - start).norm() / start.norm())
                for r, start in zip(rows, self._start[name], strict=True)
            ]
            for name, rows in self._rows.items()
        }
        if self._adapters:
            moved["moved_model"] = [_change(layer) / size for layer, size in self._adapters]
        return {name: sum(parts) / len(parts) for name, parts in moved.items() if parts}


def _unsharded(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().pow(2).mean().sqrt())


def _linear_rms(layer: nn.Linear, model: ReMatch) -> float:
    """RMS of a weight; of a quantized one, what the config says that it was initialized with."""
    if layer.weight.is_floating_point():
        return _rms(layer.weight.detach())
    config = model.backbone.model.config.get_text_config()
    return float(getattr(config, "initializer_range", None) or DEFAULT_RANGE)


def _size(layer: LoraLayer) -> int:
    """Number of weights of the layer that has the adapter."""
    return int(layer.in_features * layer.out_features)


def _change(layer: LoraLayer) -> float:
    """‖s · B · A‖, the size of an adapter's change, from products as small as its rank."""
    name = layer.active_adapters[0]
    a, b = (
        _on_cpu(_unsharded(side[name].weight)).double() for side in (layer.lora_A, layer.lora_B)
    )
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return float(layer.scaling[name]) * math.sqrt(max(squared, 0.0))
