"""Ranking metrics in numpy. Ties and NaN never count in the answer's favour.

Shapes: Q queries, C candidates; the first candidate is the answer.
"""

import numpy as np
from numpy.typing import NDArray


def answer_ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Rank, from 1, of the answer among its candidates.

    Args:
        scores: (Q, C); column 0 is the answer's.

    >>> answer_ranks(np.array([[0.9, 0.1], [0.5, 0.5], [np.nan, 0.1], [0.5, np.nan]]))
    array([1, 2, 2, 2])
    """
    answer = scores[:, :1]
    not_worse = ~(scores[:, 1:] < answer)  # a NaN on either side is not worse
    ranks: NDArray[np.int64] = 1 + not_worse.sum(axis=1)
    return ranks


def hit_at(ranks: NDArray[np.int64], k: int) -> float:
    """Share of queries whose answer is among the first ``k``, in percent.

    >>> hit_at(np.array([1, 2, 11, 12]), 10)
    50.0
    """
    return float(100 * (ranks <= k).mean())


def mrr(ranks: NDArray[np.int64]) -> float:
    """Mean reciprocal rank, in percent.

    >>> mrr(np.array([1, 2]))
    75.0
    """
    return float(100 * (1 / ranks).mean())


def ndcg_at(ranks: NDArray[np.int64], k: int) -> float:
    """Normalised discounted cumulative gain of one relevant answer, in percent.

    >>> ndcg_at(np.array([1, 3]), 10)
    75.0
    """
    return float(100 * np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0.0).mean())
