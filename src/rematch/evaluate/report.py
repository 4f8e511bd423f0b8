"""The HTML report of an evaluation."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from rematch.data.images import data_url, load_image
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.mmeb_v2_table import VIDEO_SETS, VISDOC_SETS
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


@cache
def reference_scores_v2() -> dict[str, dict[str, dict[str, float]]]:
    """Published scores of MMEB-V2 in percent, by model, modality and set."""
    path = files("rematch") / "assets/mmeb_v2_reference_scores.json"
    models: dict[str, dict[str, dict[str, float]]] = {}
    for model, modalities in json.loads(path.read_text())["models"].items():
        models[model] = {
            modality: {name: 100 * score for name, score in sets.items()}
            for modality, sets in modalities.items()
        }
    for model, sets in reference_scores()["per_dataset"].items():
        models.setdefault(model, {})["image"] = sets
    return models


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
        published=_published(content, results),
        failures=[(r.task.name, r.scores["hit@1"], _failures(r)) for r in worst],
    )
    write_text(path, html)


def _published(content: dict[str, Any], results: Sequence[TaskResult]) -> dict[str, Any] | None:
    """Scores of this run beside published ones, for each meta-task or modality and each data set;
    ``None`` if the benchmark has none.
    """
    if content["benchmark"] != "mmeb":
        return _published_v2(results)
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


def _published_v2(results: Sequence[TaskResult]) -> dict[str, Any] | None:
    """The same for MMEB-V2. Means are over the sets that this run and the published scores have,
    so that they compare like with like.
    """
    models = reference_scores_v2()
    modalities = [
        m for m in ("image", "video", "visdoc") if m in {r.task.modality for r in results}
    ]

    def published(model: str, result: TaskResult) -> float | None:
        return models[model].get(result.task.modality, {}).get(result.task.name)

    shared = {
        modality: [
            r
            for r in results
            if r.task.modality == modality and any(published(m, r) is not None for m in models)
        ]
        for modality in modalities
    }
    shared = {modality: sets for modality, sets in shared.items() if sets}
    if not shared:
        return None

    def means(score: Callable[[TaskResult], float | None]) -> list[float | None]:
        columns = []
        for sets in shared.values():
            values = [value for value in map(score, sets) if value is not None]
            columns.append(sum(values) / len(values) if len(values) == len(sets) else None)
        return columns

    source = json.loads((files("rematch") / "assets/mmeb_v2_reference_scores.json").read_text())[
        "source"
    ]
    return {
        "source": f"{source}. Images: {reference_scores()['source']}. Each mean is over the sets "
        "of this run that have published scores",
        "is_complete": len(results) == len(DATA_SETS) + len(VIDEO_SETS) + len(VISDOC_SETS),
        "columns": [f"{modality} ({len(sets)} sets)" for modality, sets in shared.items()],
        "this_run": means(lambda result: result.scores[result.task.metric]),
        "rows": {m: means(partial(published, m)) for m in models},
        "models": list(models),
        "datasets": [
            (r.task.name, r.scores[r.task.metric], [published(m, r) for m in models])
            for r in results
        ],
    }


def _failures(result: TaskResult) -> list[dict[str, Any]]:
    """A random sample of the queries whose first candidate is not relevant."""
    task = result.task
    failed = [i for i, ranks in enumerate(result.ranks) if len(ranks) and ranks[0] > 1]
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
