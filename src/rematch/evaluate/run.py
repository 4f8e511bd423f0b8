"""Retrieval evaluation: encode each distinct query and document once, rank the candidates, average
as MMEB does.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rematch.data.schema import RetrievalTask
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, ImageError, RematchError
from rematch.evaluate.metrics import (
    Ranks,
    hit_at,
    mrr_at,
    ndcg_at,
    ranking,
    ranks_of_right,
    recall_at,
)
from rematch.evaluate.rerank import Reranking, rerank
from rematch.model import ReMatch
from rematch.scoring import maxsim

_SHOWN = 10  # candidates kept of each query for predictions


@dataclass
class TaskResult:
    """What came of one task.

    Attributes:
        task: The task.
        scores: In percent.
        ranks: For each query the ranks of its right documents.
        best: For each query its first candidates, as indices of documents, and their scores.
        vectors: Of queries and documents, (Q, D) and (N, D), unit length where the model compares
            by cosine.
        methods: Other rankings of the same candidates: scores, and what they cost in
            ``ms_per_query``.
        warnings: What makes the scores doubtful.
    """

    task: RetrievalTask
    scores: dict[str, float]
    ranks: Sequence[Ranks]
    best: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=list)
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    methods: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def evaluate_task(
    encoder: Encoder,
    task: RetrievalTask,
    *,
    document_instructions: bool | None = None,
    reranking: Reranking | None = None,
    multi_vector: bool = False,
) -> TaskResult:
    """Rank every query's candidates by the model's own similarity, cosine unless it says
    otherwise.

    Args:
        encoder: Of the model.
        task: The task.
        document_instructions: Put the target-side instruction before documents; by default as the
            model was trained, and for models that are not ours, yes.
        reranking: Let the matching head put the first candidates in another order besides.
        multi_vector: Score by MaxSim over the token vectors besides.

    Raises:
        RematchError: If an input cannot be read.
    """
    model = encoder.model
    if (
        reranking
        and model.truncate_dim is not None
        and any("feat" in (view.query, view.document) for view in reranking.views)
    ):
        raise RematchError(
            "the matching head reads whole vectors only, but the model has "
            f"truncate_dim={model.truncate_dim}. Use --views raw-raw, or load the model without "
            "it."
        )
    if document_instructions is None:
        document_instructions = (
            model.backbone.document_instructions if isinstance(model, ReMatch) else True
        )
    asked = [query.as_input() for query in task.queries]
    given = [document.as_input(document_instructions) for document in task.documents]
    queries = encoder.encode(asked, "query", multi_vector=multi_vector)
    documents = encoder.encode(given, "document", multi_vector=multi_vector)
    if multi_vector:
        (queries, query_tokens), (documents, document_tokens) = _split(queries), _split(documents)
    if model.similarity_fn_name == "cosine":
        queries, documents = _unit(queries), _unit(documents)
    started = time.perf_counter()
    ranks: list[Ranks] = []
    best, scored = [], []
    for i, query in enumerate(queries):
        own, right = task.pool(i)
        scores = documents[own] @ query
        order = ranking(scores, right)
        ranks.append(np.sort(np.flatnonzero(order < right) + 1))
        best.append((own[order[:_SHOWN]], scores[order[:_SHOWN]]))
        if reranking:
            scored.append((own, right, order))
    result = TaskResult(task, summarise(ranks), ranks, best, (queries, documents))
    result.methods["embedding"] = result.scores | {
        "ms_per_query": _milliseconds(started, len(queries))
    }
    if multi_vector:
        started = time.perf_counter()
        pools = [task.pool(i) for i in range(len(queries))]
        found: Sequence[Ranks] = [
            ranks_of_right(maxsim(query_tokens[i], document_tokens[own]), right)
            for i, (own, right) in enumerate(pools)
        ]
        result.methods["MaxSim"] = summarise(found) | {
            "ms_per_query": _milliseconds(started, len(queries))
        }
    if reranking:
        assert isinstance(model, ReMatch)
        for view in reranking.views:
            started = time.perf_counter()
            found = rerank(
                model,
                {"raw": asked, "feat": queries},
                {"raw": given, "feat": documents},
                scored,
                reranking.top,
                view,
            )
            name = f"rerank {reranking.top}, {view}"
            result.methods[name] = summarise(found) | {
                "ms_per_query": _milliseconds(started, len(queries))
            }
    result.warnings = _doubts(result)
    return result


def _split(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return vectors[:, 0], vectors[:, 1:]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors if np.allclose(lengths, 1, atol=1e-5) else vectors / np.maximum(lengths, 1e-12)


def _milliseconds(started: float, queries: int) -> float:
    return round(1000 * (time.perf_counter() - started) / max(1, queries), 3)


def summarise(ranks: Sequence[Ranks]) -> dict[str, float]:
    """The scores of a task, in percent."""
    scores = {f"hit@{k}": hit_at(ranks, k) for k in (1, 5, 10)}
    scores |= {"mrr": mrr_at(ranks), "ndcg@10": ndcg_at(ranks, 10)}
    if any(len(r) > 1 for r in ranks):
        scores["recall@10"] = recall_at(ranks, 10)
    return scores


def chance(task: RetrievalTask) -> float:
    """Hit@1 of guessing, in percent."""
    pools = [task.pool(i) for i in range(len(task.queries))]
    return 100 * float(np.mean([right / len(own) for own, right in pools]))


def _doubts(result: TaskResult) -> list[str]:
    assert result.vectors is not None
    found, name = [], result.task.name
    for what, vectors in zip(("queries", "documents"), result.vectors, strict=True):
        broken = ~np.isfinite(vectors).all(axis=1)
        if broken.any():
            found.append(
                f"{name}: {broken.sum()} of {len(vectors)} vectors of {what} hold NaN or infinity"
            )
        elif len(vectors) > 1 and float(np.ptp(vectors, axis=0).max()) < 1e-5:
            found.append(
                f"{name}: all vectors of {what} are equal; the model cannot tell them apart"
            )
    guess, hits, queries = chance(result.task), result.scores["hit@1"], len(result.task.queries)
    spread = 100 * np.sqrt(guess / 100 * (1 - guess / 100) / queries)
    if hits <= guess + 2 * spread:
        found.append(f"{name}: Hit@1 {hits:.1f} is no better than chance ({guess:.1f})")
    return found


def evaluate(
    encoder: Encoder,
    tasks: Sequence[RetrievalTask],
    *,
    progress: Callable[[str], None] = lambda _: None,
    skip_missing: bool = False,
    **options: Any,
) -> tuple[list[TaskResult], dict[str, str]]:
    """Evaluate task after task.

    Args:
        encoder: Of the model.
        tasks: The tasks.
        progress: Told each one's name when it is done.
        skip_missing: Leave out a task whose pictures cannot be read, instead of stopping.
        options: As for :func:`evaluate_task`.

    Returns:
        The results, and why tasks were left out.
    """
    results, left_out = [], {}
    for task in tasks:
        try:
            results.append(evaluate_task(encoder, task, **options))
        except (ImageError, DataError) as error:
            if not skip_missing:
                raise
            left_out[task.name] = str(error)
        progress(task.name)
    return results, left_out


def summary(
    results: Sequence[TaskResult], scores: Callable[[TaskResult], float] | None = None
) -> dict[str, float]:
    """Means of Hit@1 over tasks.

    ``overall`` and each meta-task are plain means, as MMEB's; ``ind`` and ``ood`` those over tasks
    in and out of distribution. Picto asks each task in both: ``overall`` and the meta-tasks are
    then those in distribution, and ``ood_overall`` is told apart.
    """
    twins = any(r.task.name.endswith("-OOD") for r in results)
    of = scores or (lambda r: r.scores["hit@1"])

    def mean(chosen: Sequence[TaskResult]) -> float:
        return round(float(np.mean([of(r) for r in chosen])), 2)

    counted = [r for r in results if not (twins and r.task.ood)]
    means = {"overall": mean(counted)} if counted else {}
    metas = dict.fromkeys(r.task.meta_task for r in counted)
    means |= {meta: mean([r for r in counted if r.task.meta_task == meta]) for meta in metas}
    apart = {
        "ood": [r for r in results if r.task.ood],
        "ind": [r for r in results if not r.task.ood],
    }
    if twins:
        return means | {"ood_overall": mean(apart["ood"])}
    return means | (
        {name: mean(apart[name]) for name in ("ind", "ood")}
        if apart["ood"] and apart["ind"]
        else {}
    )


def baselines(tasks: Sequence[RetrievalTask]) -> dict[str, dict[str, float]]:
    """What needs no model: ``chance``, and always naming the ``commonest`` answer; means as in
    :func:`summary`.
    """
    empty = [TaskResult(task, {}, []) for task in tasks]
    return {
        "chance": summary(empty, lambda r: chance(r.task)),
        "commonest": summary(empty, lambda r: _commonest(r.task)),
    }


def _commonest(task: RetrievalTask) -> float:
    answers: Counter[str] = Counter()
    for i in range(len(task.queries)):
        own, right = task.pool(i)
        answers.update({task.documents[j].key for j in own[:right]})
    return 100 * answers.most_common(1)[0][1] / len(task.queries)
