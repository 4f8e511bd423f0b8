"""Which sample stands where in a training run: fixed by the seed, so that a run that was cut off
goes on exactly.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def plan(
    sizes: Sequence[int],
    weights: Sequence[float],
    batches: int,
    batch_size: int,
    seed: int,
    homogeneous: bool = False,
) -> NDArray[np.int64]:
    """Draw samples from several sources, each source shuffled anew whenever it is used up.

    Args:
        sizes: Samples in each source.
        weights: How often each source is drawn, relative to the others.
        batches: Number of batches.
        batch_size: Samples in each, over all processes.
        seed: Of the draws.
        homogeneous: Draw a source per batch instead of per sample.

    Returns:
        (batches · batch_size, 2): source and index in it.

    >>> plan([2], [1.0], 2, 2, seed=0)[:, 1].reshape(2, 2).sum(1)
    array([1, 1])
    """
    rng = np.random.default_rng(seed)
    draws = batches if homogeneous else batches * batch_size
    chosen = rng.choice(len(sizes), draws, p=np.asarray(weights) / np.sum(weights))
    chosen = np.repeat(chosen, batch_size) if homogeneous else chosen
    streams = [
        _shuffled(size, np.random.default_rng([seed, source])) for source, size in enumerate(sizes)
    ]
    return np.array([(source, next(streams[source])) for source in chosen], dtype=np.int64)


def _shuffled(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()
