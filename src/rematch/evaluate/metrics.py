"""Ranking metrics in numpy. Ties and NaN never count in favour of a relevant candidate.

A query has C candidates, of which the first P are relevant.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]


def rank_candidates(scores: NDArray[np.floating], relevant: int = 1) -> NDArray[np.int64]:
    """Positions of the candidates from best to worst, (C,). Among candidates with equal scores,
    the relevant ones come last; a relevant candidate whose score is NaN comes last of all.

    Args:
        scores: Scores of the candidates, (C,).
        relevant: P, the number of relevant candidates.

    >>> rank_candidates(np.array([0.5, 0.9, 0.5, np.nan])).tolist()
    [3, 1, 2, 0]
    """
    is_relevant = np.arange(len(scores)) < relevant
    fair = np.where(np.isnan(scores), np.where(is_relevant, -np.inf, np.inf), scores)
    order: NDArray[np.int64] = np.lexsort((is_relevant, -fair))
    return order


def ranks_in(order: NDArray[np.int64], relevant: int = 1) -> Ranks:
    """Ranks of the relevant candidates in an order of :func:`rank_candidates`, from 1 and
    ascending, (P,).
    """
    return np.flatnonzero(order < relevant) + 1


def ranks_of_relevant(scores: NDArray[np.floating], relevant: int = 1) -> Ranks:
    """Ranks of the relevant candidates, from 1 and ascending, (P,).

    >>> ranks_of_relevant(np.array([0.5, 0.7, 0.6]), relevant=2).tolist()
    [1, 3]
    """
    return ranks_in(rank_candidates(scores, relevant), relevant)


def hit_at(ranks: Sequence[Ranks], k: int) -> float:
    """Percentage of queries with a relevant candidate among the first ``k``; the image-text
    benchmarks call it R@k.

    >>> hit_at([np.array([1, 20]), np.array([11])], 10)
    50.0
    """
    return 100 * float(np.mean([r[0] <= k for r in ranks]))


def mrr_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean reciprocal rank of the first relevant candidate, counted as 0 beyond ``k``, in percent.

    >>> mrr_at([np.array([1]), np.array([2])])
    75.0
    """
    return 100 * float(np.mean([1 / r[0] if r[0] <= k else 0.0 for r in ranks]))


def ndcg_at(ranks: Sequence[Ranks], k: int) -> float:
    """Normalized discounted cumulative gain of equally relevant candidates, in percent.

    >>> ndcg_at([np.array([1]), np.array([3])], 10)
    75.0
    """

    def gain(ranks_of_query: Ranks) -> float:
        return float((1 / np.log2(ranks_of_query[ranks_of_query <= k] + 1.0)).sum())

    return 100 * float(np.mean([gain(r) / gain(np.arange(1, len(r) + 1)) for r in ranks]))


def recall_at(ranks: Sequence[Ranks], k: int) -> float:
    """Mean share of a query's relevant candidates that are among the first ``k``, in percent.

    >>> recall_at([np.array([1, 20]), np.array([2])], 10)
    75.0
    """
    return 100 * float(np.mean([(r <= k).mean() for r in ranks]))


def map_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean average precision, in percent.

    >>> map_at([np.array([1, 4])])
    75.0
    """

    def average_precision(ranks_of_query: Ranks) -> float:
        precisions = np.arange(1, len(ranks_of_query) + 1) / ranks_of_query
        total = float(precisions[ranks_of_query <= k].sum())
        return total / min(len(ranks_of_query), max(1, k))

    return 100 * float(np.mean([average_precision(r) for r in ranks]))
