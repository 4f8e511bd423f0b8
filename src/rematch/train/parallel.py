"""Several processes as one: vectors of all of them in the loss, as many forward passes in each,
one reduction a step.

Gradients are averaged over processes by DDP or FSDP2, and every process takes means over as many
samples, so the sum of it all is the gradient of the global batch (tests/test_parallel.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import all_gather, get_rank, get_world_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def gather(tensor: Tensor) -> Tensor:
    """Rows of all processes, one after the other; gradients flow back to the process that a row
    came from.
    """
    if get_world_size() == 1:
        return tensor
    gathered: Tensor = all_gather(tensor.contiguous(), with_grad=tensor.requires_grad)
    return gathered


def first_row(rows: int) -> int:
    """Where this process's rows begin among those that :func:`gather` returns."""
    return int(get_rank()) * rows


def largest(counts: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each count over all processes.

    Args:
        counts: As many in every process.
        device: Of the model; a process group serves its device only (NCCL has no CPU tensors).
    """
    if get_world_size() == 1:
        return list(counts)
    values = torch.tensor(counts, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    maxima: list[int] = values.tolist()
    return maxima


def aligned(steps: Sequence[T], count: int, idle: T | None = None) -> list[tuple[T, float]]:
    """Steps and their weights, ``count`` in every process: sharded weights are gathered by all
    processes together.

    Args:
        steps: Of this process.
        count: The largest number of steps of any process (:func:`largest`).
        idle: What fills up at weight 0; by default the last step again.

    >>> aligned(["a", "b"], 3)
    [('a', 1.0), ('b', 1.0), ('b', 0.0)]
    """
    filler = list(steps[-1:]) if idle is None else [idle]
    return [(step, 1.0) for step in steps] + [(step, 0.0) for step in filler] * (
        count - len(steps)
    )


def touch(model: nn.Module) -> Tensor | float:
    """Zero, through every trainable weight: under DDP none of them may be missing from a backward
    pass.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0


@contextmanager
def piling_up(model: nn.Module, last: bool = False) -> Iterator[None]:
    """Let gradients pile up in each process, but for the ``last`` backward pass, which reduces
    them all.
    """
    if last:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def mean_over_processes(gradient: Any) -> Any:
    """Average of a gradient that DDP knows nothing of."""
    if get_world_size() > 1:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        gradient /= get_world_size()
    return gradient
