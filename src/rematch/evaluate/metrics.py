"""Ranking metrics in numpy, and how sure a difference between two models is. Ties and NaN never
count in favour of a relevant candidate.

A query has C candidates, of which the first P are relevant; P may be 0, and the query then counts
as 0. A grade says how relevant a candidate is; without grades all are equally relevant.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ranks = NDArray[np.int64]
Grades = NDArray[np.float64]


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


def hits_at(ranks: Sequence[Ranks], k: int) -> NDArray[np.bool_]:
    """Whether each query has a relevant candidate among the first ``k``, (Q,), in the order of
    ``ranks``.

    >>> hits_at([np.array([1, 20]), np.array([11])], 10).tolist()
    [True, False]
    """
    return np.array([len(r) > 0 and r[0] <= k for r in ranks], np.bool_)


def hit_at(ranks: Sequence[Ranks], k: int) -> float:
    """Percentage of queries with a relevant candidate among the first ``k``; the image-text
    benchmarks call it R@k.

    >>> hit_at([np.array([1, 20]), np.array([11])], 10)
    50.0
    """
    return 100 * float(np.mean(hits_at(ranks, k)))


def mrr_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean reciprocal rank of the first relevant candidate, counted as 0 beyond ``k``, in percent.

    >>> mrr_at([np.array([1]), np.array([2])])
    75.0
    """
    return 100 * float(np.mean([1 / r[0] if len(r) and r[0] <= k else 0.0 for r in ranks]))


def ndcg_at(
    ranks: Sequence[Ranks],
    k: int,
    grades: Sequence[Grades] | None = None,
    exponential: bool = False,
) -> float:
    """Normalized discounted cumulative gain, in percent.

    Args:
        ranks: For each query the ranks of its relevant candidates.
        k: How many candidates count.
        grades: For each query the grades, above 0, of the candidates at these ranks; 1 if left
            out.
        exponential: Whether a grade g gains 2^g - 1 instead of g.

    >>> ndcg_at([np.array([1]), np.array([3])], 10)
    75.0
    >>> round(ndcg_at([np.array([1, 2])], 5, [np.array([1.0, 3.0])]), 2)
    79.67
    """
    if grades is None:
        grades = [np.ones(len(r)) for r in ranks]

    def gain(ranks_of_query: Ranks, grades_of_query: Grades) -> float:
        gains = np.exp2(grades_of_query) - 1 if exponential else grades_of_query
        counts = ranks_of_query <= k
        return float((gains[counts] / np.log2(ranks_of_query[counts] + 1.0)).sum())

    def best(grades_of_query: Grades) -> float:
        return gain(np.arange(1, len(grades_of_query) + 1), -np.sort(-grades_of_query))

    return 100 * float(
        np.mean(
            [gain(r, g) / best(g) if len(r) else 0.0 for r, g in zip(ranks, grades, strict=True)]
        )
    )


def precision_at(ranks: Sequence[Ranks], k: int) -> float:
    """Mean share of the first ``k`` candidates that are relevant, in percent.

    >>> precision_at([np.array([1, 20]), np.array([2])], 10)
    10.0
    """
    return 100 * float(np.mean([(r <= k).sum() / k for r in ranks]))


def f1_at(ranks: Sequence[Ranks], k: int) -> float:
    """Mean harmonic mean of each query's precision and recall at ``k``, in percent.

    >>> f1_at([np.array([1])], 1), round(f1_at([np.array([2])], 5), 2)
    (100.0, 33.33)
    """
    return 100 * float(np.mean([2 * (r <= k).sum() / (k + len(r)) for r in ranks]))


def recall_at(ranks: Sequence[Ranks], k: int) -> float:
    """Mean share of a query's relevant candidates that are among the first ``k``, in percent.

    >>> recall_at([np.array([1, 20]), np.array([2])], 10)
    75.0
    """
    return 100 * float(np.mean([(r <= k).mean() if len(r) else 0.0 for r in ranks]))


def map_at(ranks: Sequence[Ranks], k: float = np.inf) -> float:
    """Mean average precision, in percent.

    >>> map_at([np.array([1, 4])])
    75.0
    """

    def average_precision(ranks_of_query: Ranks) -> float:
        if not len(ranks_of_query):
            return 0.0
        precisions = np.arange(1, len(ranks_of_query) + 1) / ranks_of_query
        total = float(precisions[ranks_of_query <= k].sum())
        return total / min(len(ranks_of_query), max(1, k))

    return 100 * float(np.mean([average_precision(r) for r in ranks]))


class Interval(NamedTuple):
    """A difference in percentage points.

    Attributes:
        mean: The difference that was measured.
        low: Lower end of its interval.
        high: Upper end of its interval.
    """

    mean: float
    low: float
    high: float


def paired_interval(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the difference between two arms that answered the same queries.

    With T tasks, S runs of each arm, the Q_t queries of task t and hits a_tsq and b_tsq, the
    difference is a mean over tasks of mean differences, in percentage points:

        Δ = 100 / T · Σ_t 1 / (S Q_t) · Σ_s Σ_q (a_tsq - b_tsq)

    A resample draws with replacement Q_t queries of each task and S runs, the same ones for all
    tasks; both arms get the same draws, so what makes a query easy or hard for both cancels. The
    interval holds the middle ``level`` of the Δ of all resamples (percentile bootstrap).

    With one run it says how sure the difference of *these two models* is, not that of two ways of
    training. With S runs it is too narrow by a factor of about √((S - 1) / S) as far as runs
    differ.

    Args:
        a: For each task the hits (0 or 1) of the first arm, (Q_t,) or, with several runs,
            (S, Q_t); run s of both arms has the same training seed.
        b: The hits of the second arm, in the same shapes and the same order of queries.
        level: Share of the resamples that the interval holds.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If there are no tasks or queries, or the shapes of the arms differ.

    >>> paired_interval([[1, 1, 1, 0]], [[1, 0, 1, 0]])
    Interval(mean=25.0, low=0.0, high=75.0)
    """
    differences = _differences(a, b)
    runs = differences[0].shape[0]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs  # (resamples, S)
    means = np.zeros(resamples)
    for difference in differences:
        queries = rng.integers(difference.shape[1], size=(resamples, difference.shape[1]))
        of_runs = np.take_along_axis(weights @ difference, queries, axis=1)
        means += of_runs.mean(axis=1) / len(differences)
    low, high = 100 * np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = 100 * np.mean([difference.mean() for difference in differences])
    return Interval(float(mean), float(low), float(high))


def _differences(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    """Differences of the hits of each task, (S, Q_t)."""
    if not len(a) or len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} tasks: give both arms' hits of the same tasks.")
    differences = []
    for task, (hits_a, hits_b) in enumerate(zip(a, b, strict=True)):
        first, second = (np.atleast_2d(np.asarray(hits, np.float64)) for hits in (hits_a, hits_b))
        if first.shape != second.shape or first.ndim != 2 or not first.size:
            raise ValueError(
                f"task {task}: the arms' hits have the shapes {first.shape} and {second.shape}. "
                "Give both as (queries,) or (runs, queries), of the same queries and runs."
            )
        differences.append(first - second)
    if len({len(difference) for difference in differences}) > 1:
        raise ValueError(
            f"the tasks have {', '.join(str(len(d)) for d in differences)} runs. Give each task "
            "the hits of the same runs."
        )
    return differences
