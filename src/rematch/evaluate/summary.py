"""Means of scores over tasks, and what a model without knowledge would reach."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rematch.data.schema import RetrievalTask

_DISCOUNTS = 1 / np.log2(np.arange(1, 6) + 1.0)  # of the ranks that nDCG@5 counts


def task_means(tasks: Sequence[RetrievalTask], values: Sequence[float]) -> dict[str, float]:
    """Means of one value per task, as MMEB reports them.

    Args:
        tasks: The tasks.
        values: A value of each task, such as its Hit@1.

    Returns:
        ``overall``: the mean over all tasks. Each modality (MMEB-V2) and each meta-task: the mean
        over its tasks. ``ind`` and ``ood``: the means over the tasks on images in and out of
        distribution, if there are both.
        ``style``: the mean over the tasks in an unseen style, if there are any; they count in
        ``overall`` and in no other mean.
    """
    groups: dict[str, list[float]] = {"overall": list(values)} if values else {}
    for task, value in zip(tasks, values, strict=True):
        if task.modality:
            groups.setdefault(task.modality, []).append(value)
    by_distribution: dict[str, list[float]] = {"ind": [], "ood": []}
    style: list[float] = []
    for task, value in zip(tasks, values, strict=True):
        if task.unseen_style:
            style.append(value)
        else:
            groups.setdefault(task.meta_task, []).append(value)
            if task.modality in ("", "image"):
                by_distribution["ood" if task.ood else "ind"].append(value)
    if all(by_distribution.values()):
        groups |= by_distribution
    if style:
        groups["style"] = style
    return {name: round(float(np.mean(group)), 2) for name, group in groups.items()}


def baselines(tasks: Sequence[RetrievalTask]) -> dict[str, dict[str, float]]:
    """Means of each task's metric, as of :func:`task_means`, that need no model: of ``chance``,
    and of always giving the ``commonest`` answer.
    """
    return {
        "chance": task_means(tasks, [chance(task) for task in tasks]),
        "commonest": task_means(tasks, [_commonest(task) for task in tasks]),
    }


def chance(task: RetrievalTask) -> float:
    """What a random ranking reaches in the task's metric on average, in percent."""
    if task.metric == "hit@1":
        return hit_chance(task)
    values = []
    for i in range(len(task.queries)):
        candidates, _ = task.pool(i)
        grades = task.relevance(i)
        # at each rank a random document gains the mean grade
        gain = grades.sum() / len(candidates) * _DISCOUNTS[: len(candidates)].sum()
        values.append(gain / _best_gain(grades) if len(grades) else 0.0)
    return 100 * float(np.mean(values))


def hit_chance(task: RetrievalTask) -> float:
    """Hit@1 of a random ranking, in percent."""
    pools = map(task.pool, range(len(task.queries)))  # one at a time: they may be large
    return 100 * float(np.mean([relevant / len(candidates) for candidates, relevant in pools]))


def _best_gain(grades: NDArray[np.float64]) -> float:
    """The discounted gain of the best ranking, cut off where the metric is."""
    best = -np.sort(-grades)[: len(_DISCOUNTS)]
    return float((best * _DISCOUNTS[: len(best)]).sum())


def _commonest(task: RetrievalTask) -> float:
    """What always giving the same answer reaches, the best one for the task, in percent."""
    gains: defaultdict[str, float] = defaultdict(float)
    for i in range(len(task.queries)):
        candidates, relevant = task.pool(i)
        grades = task.relevance(i)
        best = _best_gain(grades) if task.metric == "ndcg@5" and relevant else 1.0
        for j, grade in zip(candidates[:relevant], grades, strict=True):
            gains[task.documents[j].key] += grade / best
    return 100 * max(gains.values(), default=0.0) / len(task.queries)
