"""Means of scores over tasks, and what a model without knowledge would reach."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rematch.data.schema import RetrievalTask


def task_means(tasks: Sequence[RetrievalTask], values: Sequence[float]) -> dict[str, float]:
    """Means of one value per task, as MMEB reports them.

    Args:
        tasks: The tasks.
        values: A value of each task, such as its Hit@1.

    Returns:
        ``overall``: the mean over all tasks. Each meta-task: the mean over its tasks. ``ind`` and
        ``ood``: the means over the tasks in and out of distribution, if there are both.
        ``style``: the mean over the tasks in an unseen style, if there are any; they count in
        ``overall`` and in no other mean.
    """
    groups: dict[str, list[float]] = {"overall": list(values)} if values else {}
    by_distribution: dict[str, list[float]] = {"ind": [], "ood": []}
    style: list[float] = []
    for task, value in zip(tasks, values, strict=True):
        if task.unseen_style:
            style.append(value)
        else:
            groups.setdefault(task.meta_task, []).append(value)
            by_distribution["ood" if task.ood else "ind"].append(value)
    if all(by_distribution.values()):
        groups |= by_distribution
    if style:
        groups["style"] = style
    return {name: round(float(np.mean(group)), 2) for name, group in groups.items()}


def baselines(tasks: Sequence[RetrievalTask]) -> dict[str, dict[str, float]]:
    """Means of Hit@1, as of :func:`task_means`, that need no model: of ``chance``, and of always
    giving the ``commonest`` answer.
    """
    return {
        "chance": task_means(tasks, [chance(task) for task in tasks]),
        "commonest": task_means(tasks, [_commonest(task) for task in tasks]),
    }


def chance(task: RetrievalTask) -> float:
    """Hit@1 of a random ranking, in percent."""
    pools = [task.pool(i) for i in range(len(task.queries))]
    return 100 * float(np.mean([relevant / len(candidates) for candidates, relevant in pools]))


def _commonest(task: RetrievalTask) -> float:
    """Hit@1 of always giving the answer that is relevant to the most queries, in percent."""
    answers: Counter[str] = Counter()
    for i in range(len(task.queries)):
        candidates, relevant = task.pool(i)
        answers.update({task.documents[j].key for j in candidates[:relevant]})
    return 100 * answers.most_common(1)[0][1] / len(task.queries)
