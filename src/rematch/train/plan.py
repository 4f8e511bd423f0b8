"""The order of the samples in a training run.

The seed fixes it before the first step, so an interrupted run resumes with the same batches.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def plan_samples(
    sizes: Sequence[int],
    weights: Sequence[float],
    batches: int,
    batch_size: int,
    seed: int,
    homogeneous: bool = False,
) -> NDArray[np.int64]:
    """Draw samples from several sources, each in random order, which is new in each epoch.

    Args:
        sizes: Number of samples in each source.
        weights: Relative frequency of each source.
        batches: Number of batches.
        batch_size: Samples per batch, over all processes.
        seed: Seed of the random order.
        homogeneous: Draw a source for each batch instead of for each sample.

    Returns:
        Source and index in the source of each sample, (batches · batch_size, 2).

    >>> plan_samples([2], [1.0], 2, 2, seed=0)[:, 1].reshape(2, 2).sum(1)
    array([1, 1])
    """
    rng = np.random.default_rng(seed)
    draws = batches if homogeneous else batches * batch_size
    sources = rng.choice(len(sizes), draws, p=np.asarray(weights) / np.sum(weights))
    if homogeneous:
        sources = np.repeat(sources, batch_size)
    streams = [
        _shuffled(size, np.random.default_rng([seed, source])) for source, size in enumerate(sizes)
    ]
    return np.array([(source, next(streams[source])) for source in sources], dtype=np.int64)


def _shuffled(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()
