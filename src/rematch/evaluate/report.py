"""The HTML report of an evaluation."""

import json
import random
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from rematch.data.images import data_url, load_image
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.schema import Item
from rematch.evaluate.run import TaskResult
from rematch.files import write_text

_WORST_TASKS = 5
_FAILURES = 6  # queries shown of each of these tasks
_CANDIDATES = 3  # candidates shown of each query
_CHARACTERS = 240  # of a text


@cache
def reference_scores() -> dict[str, Any]:
    """Published MMEB scores: ``per_dataset``, ``meta_task_scores`` with their ``columns``, and
    their ``source``.
    """
    path = files("rematch") / "assets/mmeb_reference_scores.json"
    scores: dict[str, Any] = json.loads(path.read_text())
    return scores


def write_report(path: Path, content: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Write the report.

    Args:
        path: File to write.
        content: The content of ``scores.json``.
        results: The results of the tasks.
    """
    template = jinja2.Template(
        (files("rematch") / "assets/evaluation.html.jinja").read_text(), autoescape=True
    )
    sections: dict[str, list[TaskResult]] = {}  # named like the mean that they count in
    for result in results:
        section = "style" if result.task.unseen_style else result.task.meta_task
        sections.setdefault(section, []).append(result)
    worst = sorted(results, key=lambda result: result.scores["hit@1"])[:_WORST_TASKS]
    html = template.render(
        report=content,
        sections=sections,
        published=_published(content, results) if content["benchmark"] == "mmeb" else None,
        failures=[(r.task.name, r.scores["hit@1"], _failures(r)) for r in worst],
    )
    write_text(path, html)


def _published(content: dict[str, Any], results: Sequence[TaskResult]) -> dict[str, Any]:
    """Scores of this run beside published ones, for each meta-task and each data set."""
    scores = reference_scores()
    meta_task_scores = dict(scores["meta_task_scores"])
    columns = meta_task_scores.pop("columns")
    models = scores["per_dataset"]
    return {
        "source": scores["source"],
        "is_complete": len(results) == len(DATA_SETS),
        "columns": columns,
        "this_run": [content["scores"].get(column) for column in columns],
        "rows": meta_task_scores,
        "models": list(models),
        "datasets": [
            (r.task.name, r.scores["hit@1"], [models[m].get(r.task.name) for m in models])
            for r in results
        ],
    }


def _failures(result: TaskResult) -> list[dict[str, Any]]:
    """A random sample of the queries whose first candidate is not relevant."""
    task = result.task
    failed = [i for i, ranks in enumerate(result.ranks) if ranks[0] > 1]
    failures = []
    for i in sorted(random.Random(0).sample(failed, min(_FAILURES, len(failed)))):
        candidates, relevant = task.pool(i)
        answers = set(candidates[:relevant].tolist())
        best = result.best[i]
        pairs = zip(best.documents[:_CANDIDATES], best.scores[:_CANDIDATES], strict=True)
        failures.append(
            {
                "query": _for_template(task.queries[i]),
                "answer": _for_template(task.documents[candidates[0]]),
                "rank": int(result.ranks[i][0]),
                "best": [
                    (_for_template(task.documents[j]), float(score), int(j) in answers)
                    for j, score in pairs
                ],
            }
        )
    return failures


def _for_template(item: Item) -> dict[str, Any]:
    """An item's pictures as data URLs, and its text, shortened."""
    images = item.image if isinstance(item.image, list) else [item.image]
    urls = [data_url(load_image(image)) for image in images if image is not None]
    is_long = len(item.text) > _CHARACTERS
    return {"images": urls, "text": item.text[:_CHARACTERS] + " …" if is_long else item.text}
