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
        ``overall`` and each meta-task: means over their tasks. ``ind`` and ``ood``: means over
        the tasks in and out of distribution, if there are both. Picto has each task twice, in and
        out of distribution: there, ``overall`` and the meta-tasks are means over the tasks in
        distribution, and ``ood_overall`` is the mean over the others.
    """
    is_picto = any(task.name.endswith("-OOD") for task in tasks)
    pairs = list(zip(tasks, values, strict=True))
    inside = [value for task, value in pairs if not task.ood]
    outside = [value for task, value in pairs if task.ood]
    overall = inside if is_picto else list(values)
    by_meta_task: dict[str, list[float]] = {}
    for task, value in pairs:
        if not (is_picto and task.ood):
            by_meta_task.setdefault(task.meta_task, []).append(value)
    groups = ({"overall": overall} if overall else {}) | by_meta_task
    if is_picto:
        groups["ood_overall"] = outside
    elif inside and outside:
        groups |= {"ind": inside, "ood": outside}
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
