"""Retrieval evaluation: encode each distinct query and document once, rank the candidates, average as MMEB does."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rematch.data.schema import Item, RetrievalTask
from rematch.evaluate.metrics import answer_ranks, hit_at, mrr, ndcg_at
from rematch.model import ReMatch

META_TASKS = ("classification", "vqa", "retrieval", "grounding")


@dataclass
class TaskResult:
    """Scores of one task in percent, and for each query the rank of its answer."""

    task: RetrievalTask
    scores: dict[str, float]
    ranks: NDArray[np.int64]


Vectors = dict[str, NDArray[np.float32]]


def evaluate_task(
    model: ReMatch,
    task: RetrievalTask,
    *,
    batch_size: int = 64,
    document_instructions: bool | None = None,
    known: Vectors | None = None,
) -> TaskResult:
    """Rank every query's candidates by cosine.

    Args:
        model: Anything with ``encode_query`` and ``encode_document``.
        task: The task; the first candidate of each query is its answer.
        batch_size: Inputs per forward.
        document_instructions: Put the target-side instruction before documents; by default as the model was trained.
        known: Vectors of documents that are text alone, by their text; used and added to. Tasks share many of them.
    """
    if document_instructions is None:
        document_instructions = model.backbone.document_instructions
    queries = _encode(model.encode_query, [query.as_input() for query in task.queries], batch_size)
    documents = _encode_documents(
        model, task.documents, document_instructions, batch_size, {} if known is None else known
    )
    candidates = [np.array(c) for c in task.candidates]
    ranks = []
    for query, own in zip(queries, candidates, strict=True):
        scores = documents[own] @ query
        ranks.append(answer_ranks(scores[None])[0])
    found = np.array(ranks)
    scores = {f"hit@{k}": hit_at(found, k) for k in (1, 5, 10)}
    scores |= {"mrr": mrr(found), "ndcg@10": ndcg_at(found, 10)}
    return TaskResult(task, scores, found)


def _encode(encode: Callable[..., Any], inputs: list[dict[str, Any]], batch_size: int) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = encode(inputs, batch_size=batch_size, show_progress_bar=False)
    return vectors


def _encode_documents(
    model: ReMatch, documents: list[Item], instructions: bool, batch_size: int, known: Vectors
) -> NDArray[np.float32]:
    inputs = [document.as_input(instructions) for document in documents]
    names = [str(x["text"]) if x.keys() == {"text"} else None for x in inputs]
    new = [i for i, name in enumerate(names) if name is None or name not in known]
    found = dict(zip(new, _encode(model.encode_document, [inputs[i] for i in new], batch_size), strict=True))
    known |= {name: found[i] for i, name in enumerate(names) if name is not None and i in found}
    return np.stack([found[i] if name is None else known[name] for i, name in enumerate(names)])


def evaluate(
    model: ReMatch,
    tasks: list[RetrievalTask],
    *,
    progress: Callable[[str], None] = lambda _: None,
    document_instructions: bool | None = None,
) -> list[TaskResult]:
    """Evaluate task after task; ``progress`` is told each one's name when it is done."""
    results: list[TaskResult] = []
    known: Vectors = {}
    for task in tasks:
        results.append(evaluate_task(model, task, document_instructions=document_instructions, known=known))
        progress(task.name)
    return results


def summary(results: list[TaskResult]) -> dict[str, float]:
    """Hit@1 means: ``overall`` and each meta-task over the in-distribution tasks, ``ood_overall`` over the others."""
    ind = [r for r in results if not r.task.ood]
    means = {"overall": _mean(ind)}
    by_meta = {meta: [r for r in ind if r.task.meta_task == meta] for meta in META_TASKS}
    means |= {meta: _mean(found) for meta, found in by_meta.items() if found}
    if ood := [r for r in results if r.task.ood]:
        means["ood_overall"] = _mean(ood)
    return {name: round(value, 2) for name, value in means.items()}


def _mean(results: list[TaskResult]) -> float:
    return float(np.mean([r.scores["hit@1"] for r in results]))


def baselines(tasks: list[RetrievalTask]) -> dict[str, dict[str, float]]:
    """What needs no model: ``chance``, and always naming the ``commonest`` answer; means as in :func:`summary`."""
    chance = [
        TaskResult(t, {"hit@1": float(np.mean([100 / len(c) for c in t.candidates]))}, np.array([])) for t in tasks
    ]
    commonest = [TaskResult(t, {"hit@1": _commonest(t)}, np.array([])) for t in tasks]
    return {"chance": summary(chance), "commonest": summary(commonest)}


def _commonest(task: RetrievalTask) -> float:
    answers = Counter(task.documents[c[0]].key for c in task.candidates)
    return 100 * answers.most_common(1)[0][1] / len(task.queries)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
