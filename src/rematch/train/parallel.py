"""What makes several processes compute the gradient of one global batch.

DDP and FSDP2 average gradients over processes, and every process averages over as many samples, so
the result is the gradient of the global batch (tests/test_parallel.py). For that, vectors of all
processes enter the contrastive loss, every process runs as many forward passes, and gradients are
reduced once per step.
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
    """Concatenate the rows of all processes; gradients flow back to the process of each row."""
    if get_world_size() == 1:
        return tensor
    gathered: Tensor = all_gather(tensor.contiguous(), with_grad=tensor.requires_grad)
    return gathered


def first_row(rows: int) -> int:
    """Index of this process's first row in what :func:`gather` returns."""
    return int(get_rank()) * rows


def largest(counts: Sequence[int], device: torch.device) -> list[int]:
    """The maximum of each count over all processes.

    Args:
        counts: Counts, as many in every process.
        device: Device of the model; a process group may serve no other (NCCL has no CPU tensors).
    """
    if get_world_size() == 1:
        return list(counts)
    values = torch.tensor(counts, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    maxima: list[int] = values.tolist()
    return maxima


def of_first_process(values: Sequence[float], device: torch.device) -> list[float]:
    """What the first process passed.

    Args:
        values: Numbers, as many in every process.
        device: Device of the model, as for :func:`largest`.
    """
    if get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    shared: list[float] = tensor.tolist()
    return shared


def aligned(steps: Sequence[T], count: int, idle: T | None = None) -> list[tuple[T, float]]:
    """Weighted forward passes, as many in every process; the surplus has weight 0.

    All processes must gather sharded weights together.

    Args:
        steps: Forward passes of this process.
        count: The largest number of passes of any process (:func:`largest`).
        idle: A pass to fill up with; by default the last one again.

    >>> aligned(["a", "b"], 3)
    [('a', 1.0), ('b', 1.0), ('b', 0.0)]
    """
    filler = list(steps[-1:]) if idle is None else [idle]
    return [(step, 1.0) for step in steps] + [(step, 0.0) for step in filler] * (
        count - len(steps)
    )


def touch(model: nn.Module) -> Tensor | float:
    """A zero that depends on every trainable weight, as DDP expects of a backward pass."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0


@contextmanager
def accumulating(model: nn.Module, last: bool = False) -> Iterator[None]:
    """Accumulate gradients in each process; the ``last`` backward pass reduces them all."""
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
    """Average a gradient over processes, of a parameter that DDP does not manage."""
    if get_world_size() > 1:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        gradient /= get_world_size()
    return gradient
