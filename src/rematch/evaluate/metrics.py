"""Ranking metrics in numpy. Ties and NaN never count in an answer's favour.

One query has C candidates, the first P of which are right. R is the number of queries.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]


def ranking(scores: NDArray[np.floating], right: int = 1) -> NDArray[np.int64]:
    """Candidates from best to worst; among equals the right ones come last, and so do they if
    their score is NaN.

    Args:
        scores: (C,); the first ``right`` are those of right candidates.

    >>> ranking(np.array([0.5, 0.9, 0.5, np.nan])).tolist()
    [3, 1, 2, 0]
    """
    is_right = np.arange(len(scores)) < right
    fair = np.where(np.isnan(scores), np.where(is_right, -np.inf, np.inf), scores)
    order: NDArray[np.int64] = np.lexsort((is_right, -fair))
    return order


def ranks_of_right(scores: NDArray[np.floating], right: int = 1) -> Ranks:
    """Ranks, from 1 and ascending, of the right candidates, (P,).

    >>> ranks_of_right(np.array([0.5, 0.7, 0.6]), right=2).tolist()
    [1, 3]
    """
    return np.sort(np.flatnonzero(ranking(scores, right) < right) + 1)


def hit_at(ranks: Sequence[Ranks], k: int) -> float:
    """Share of queries with a right candidate among the first ``k``, in percent; R@k of the
    image-text benchmarks.

    >>> hit_at([np.array([1, 20]), np.array([11])], 10)
    50.0
    """
    return 100 * float(np.mean([r[0] <= k for r in ranks]))


def mrr_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean reciprocal rank of the first right candidate, 0 beyond ``k``, in percent.

    >>> mrr_at([np.array([1]), np.array([2])])
    75.0
    """
    return 100 * float(np.mean([1 / r[0] if r[0] <= k else 0.0 for r in ranks]))


def ndcg_at(ranks: Sequence[Ranks], k: int) -> float:
    """Normalised discounted cumulative gain of equally right candidates, in percent.

    >>> ndcg_at([np.array([1]), np.array([3])], 10)
    75.0
    """

    def gain(found: Ranks) -> float:
        return float((1 / np.log2(found[found <= k] + 1.0)).sum())

    return 100 * float(np.mean([gain(r) / gain(np.arange(1, len(r) + 1)) for r in ranks]))


def recall_at(ranks: Sequence[Ranks], k: int) -> float:
    """Mean share of a query's right candidates that are among the first ``k``, in percent.

    >>> recall_at([np.array([1, 20]), np.array([2])], 10)
    75.0
    """
    return 100 * float(np.mean([(r <= k).mean() for r in ranks]))


def map_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean average precision, in percent.

    >>> map_at([np.array([1, 4])])
    75.0
    """
    return 100 * float(
        np.mean(
            [
                ((np.arange(1, len(r) + 1) / r) * (r <= k)).sum() / min(len(r), max(1, k))
                for r in ranks
            ]
        )
    )
