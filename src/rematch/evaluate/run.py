"""Retrieval evaluation: encode each distinct query and document once, and rank the candidates."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from rematch.data.schema import RetrievalTask
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, ImageError, RematchError
from rematch.evaluate.metrics import (
    Grades,
    Ranks,
    hit_at,
    hits_at,
    mrr_at,
    ndcg_at,
    rank_candidates,
    ranks_in,
    recall_at,
)
from rematch.evaluate.rerank import Forms, Ranking, Reranking, rerank
from rematch.evaluate.summary import hit_chance, task_means
from rematch.model import ReMatch
from rematch.prompts import ADDED_INSTRUCTIONS
from rematch.scoring import maxsim

_SAVED_CANDIDATES = 10  # candidates of each query that predictions hold

Vectors = NDArray[np.float32]
# a query (D,) or its token vectors (K, D), documents (N, D) or (N, K, D) → scores (N,)
_Comparison = Callable[[Vectors, Vectors], Vectors]
_Graded = tuple[Ranks, Grades]  # of one query


@dataclass(frozen=True)
class BestCandidates:
    """The first candidates of a query.

    Attributes:
        documents: Indices of the documents, best first.
        scores: Their scores.
    """

    documents: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class MethodResult:
    """What one way of ranking the candidates reaches.

    Attributes:
        scores: Scores by name, in percent.
        ms_per_query: Milliseconds per query for ranking, without encoding.
    """

    scores: dict[str, float]
    ms_per_query: float


@dataclass
class TaskResult:
    """The result of one task.

    Attributes:
        task: The task.
        ranks: For each query the ranks of its relevant documents.
        grades: For each query how relevant the documents at these ranks are.
        best: For each query its first candidates.
        queries: Embeddings of the queries, (Q, D); of unit length if the model compares by
            cosine.
        documents: Embeddings of the documents, (N, D).
        methods: The result of each way of ranking; the first one, ``"embedding"``, is by the
            embeddings alone.
        warnings: Reasons to doubt the scores.
    """

    task: RetrievalTask
    ranks: Sequence[Ranks]
    grades: Sequence[Grades]
    best: list[BestCandidates]
    queries: Vectors
    documents: Vectors
    methods: dict[str, MethodResult]
    warnings: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        """Scores by the embeddings alone, in percent."""
        return self.methods["embedding"].scores

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether the first candidate of each query is relevant, (Q,), in the order of the task's
        queries; by the embeddings alone.
        """
        return hits_at(self.ranks, 1)


def evaluate_task(
    encoder: Encoder,
    task: RetrievalTask,
    *,
    document_instructions: bool | None = None,
    reranking: Reranking | None = None,
    multi_vector: bool = False,
) -> TaskResult:
    """Rank every query's candidates by the model's own similarity, which is usually the cosine.

    Args:
        encoder: Encoder of the model.
        task: The task.
        document_instructions: Whether documents get the instruction of the target side. By
            default, ReMatch models do as they were trained, and other models get what the data
            brings, without what ReMatch adds for texts.
        reranking: Also rank the candidates by the matching head.
        multi_vector: Also rank the candidates by MaxSim over the token vectors.

    Raises:
        RematchError: If an input cannot be read, or the model cannot rerank.
    """
    model = encoder.model
    if reranking:
        _check_width(model, reranking)
    if document_instructions is None and isinstance(model, ReMatch):
        document_instructions = model.backbone.document_instructions
    query_inputs = [query.as_input() for query in task.queries]
    document_inputs = [
        document.as_input(
            document.instruction not in ADDED_INSTRUCTIONS
            if document_instructions is None
            else document_instructions
        )
        for document in task.documents
    ]
    queries = encoder.encode(query_inputs, "query", multi_vector=multi_vector)
    documents = encoder.encode(document_inputs, "document", multi_vector=multi_vector)
    if multi_vector:
        queries, query_tokens = queries[:, 0], queries[:, 1:]
        documents, document_tokens = documents[:, 0], documents[:, 1:]
    if model.similarity_fn_name == "cosine":
        queries, documents = _normalize(queries), _normalize(documents)
    compare = _comparison(model)

    # a query's candidates may be the whole corpus: only a few of each query are kept
    started = time.perf_counter()
    graded: list[_Graded] = []
    best: list[BestCandidates] = []
    rankings: list[Ranking] = []
    for i, query in enumerate(queries):
        candidates, relevant = task.pool(i)
        scores = _scores(compare, query, documents, candidates)
        order = rank_candidates(scores, relevant)
        graded.append(_graded_ranks(order, task.relevance(i)))
        first = order[:_SAVED_CANDIDATES]
        best.append(BestCandidates(candidates[first], scores[first]))
        if reranking:
            top = order[: reranking.top].copy()
            rankings.append(Ranking(candidates[top], top, relevant))
    methods = {"embedding": _method_result(graded, started)}

    if multi_vector:
        started = time.perf_counter()
        by_maxsim: list[_Graded] = []
        for i, tokens in enumerate(query_tokens):
            candidates, relevant = task.pool(i)
            order = rank_candidates(_scores(maxsim, tokens, document_tokens, candidates), relevant)
            by_maxsim.append(_graded_ranks(order, task.relevance(i)))
        methods["MaxSim"] = _method_result(by_maxsim, started)
    if reranking:
        assert isinstance(model, ReMatch)
        query_forms: Forms = {"raw": query_inputs, "feat": queries}
        document_forms: Forms = {"raw": document_inputs, "feat": documents}
        for view in reranking.views:
            started = time.perf_counter()
            orders = rerank(model, query_forms, document_forms, rankings, view)
            reranked = [
                _reranked(order, task.relevance(i), graded[i]) for i, order in enumerate(orders)
            ]
            methods[f"rerank {reranking.top}, {view}"] = _method_result(reranked, started)
    ranks, grades = [r for r, _ in graded], [g for _, g in graded]
    result = TaskResult(task, ranks, grades, best, queries, documents, methods)
    result.warnings = [f"{task.name}: {note}" for note in task.notes] + _warnings(result)
    return result


def _check_width(model: SentenceTransformer, reranking: Reranking) -> None:
    """The matching head takes whole vectors only."""
    reads_vectors = any("feat" in (view.query, view.document) for view in reranking.views)
    if reads_vectors and model.truncate_dim is not None:
        raise RematchError(
            "the matching head reads whole vectors only, but the model has "
            f"truncate_dim={model.truncate_dim}. Use --views raw-raw, or load the model without "
            "it."
        )


def _normalize(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors if np.allclose(lengths, 1, atol=1e-5) else vectors / np.maximum(lengths, 1e-12)


def _comparison(model: SentenceTransformer) -> _Comparison:
    """The model's own similarity; of unit-length vectors if that is the cosine."""
    if model.similarity_fn_name in ("cosine", "dot"):
        return lambda query, documents: documents @ query
    return lambda query, documents: model.similarity(query, documents)[0].numpy()


def _scores(
    compare: _Comparison,
    query: Vectors,
    documents: Vectors,
    candidates: NDArray[np.int64],
) -> Vectors:
    """Scores of a query's candidates, (C,); all documents are compared without a copy of them."""
    if len(candidates) == len(documents):
        return compare(query, documents)[candidates]
    return compare(query, documents[candidates])


def _graded_ranks(order: NDArray[np.int64], relevance: Grades) -> _Graded:
    """Ranks of a query's relevant documents, ascending, and the grades of these documents."""
    ranks = ranks_in(order, len(relevance))
    return ranks, relevance[order[ranks - 1]]


def _reranked(order: NDArray[np.int64], relevance: Grades, before: _Graded) -> _Graded:
    """:func:`_graded_ranks` where only the first candidates have a new order, (T,)."""
    is_below = before[0] > len(order)
    ranks, grades = _graded_ranks(order, relevance)
    return np.append(ranks, before[0][is_below]), np.append(grades, before[1][is_below])


def _method_result(graded: Sequence[_Graded], started: float) -> MethodResult:
    milliseconds = 1000 * (time.perf_counter() - started) / max(1, len(graded))
    scores = summarize([ranks for ranks, _ in graded], [grades for _, grades in graded])
    return MethodResult(scores, round(milliseconds, 3))


def summarize(ranks: Sequence[Ranks], grades: Sequence[Grades] | None = None) -> dict[str, float]:
    """The scores of a task by name, in percent.

    Args:
        ranks: For each query the ranks of its relevant documents.
        grades: For each query how relevant the documents at these ranks are; equally, if left out.
    """
    scores = {f"hit@{k}": hit_at(ranks, k) for k in (1, 5, 10)}
    scores |= {"mrr": mrr_at(ranks)}
    scores |= {f"ndcg@{k}": ndcg_at(ranks, k, grades) for k in (5, 10)}
    if any(len(r) > 1 for r in ranks):
        scores["recall@10"] = recall_at(ranks, 10)
    return scores


def _warnings(result: TaskResult) -> list[str]:
    """Reasons to doubt a result: broken or equal vectors, scores near chance."""
    name = result.task.name
    warnings = []
    for side, vectors in (("queries", result.queries), ("documents", result.documents)):
        is_broken = ~np.isfinite(vectors).all(axis=1)
        if is_broken.any():
            warnings.append(
                f"{name}: {is_broken.sum()} of {len(vectors)} vectors of {side} contain NaN or "
                "infinity"
            )
        elif len(vectors) > 1 and float(np.ptp(vectors, axis=0).max()) < 1e-5:
            warnings.append(
                f"{name}: all vectors of {side} are equal; the model cannot tell them apart"
            )
    hits, expected = result.scores["hit@1"], hit_chance(result.task)
    deviation = 100 * np.sqrt(expected / 100 * (1 - expected / 100) / len(result.task.queries))
    if hits <= expected + 2 * deviation:
        warnings.append(f"{name}: Hit@1 {hits:.1f} is no better than chance ({expected:.1f})")
    return warnings


def evaluate(
    encoder: Encoder,
    tasks: Sequence[RetrievalTask],
    *,
    progress: Callable[[str], None] = lambda _: None,
    skip_missing: bool = False,
    **options: Any,
) -> tuple[list[TaskResult], dict[str, str]]:
    """Evaluate several tasks.

    Args:
        encoder: Encoder of the model.
        tasks: The tasks.
        progress: Called with the name of each task after its evaluation.
        skip_missing: Leave out tasks whose pictures cannot be read, instead of raising an error.
        options: Further arguments of :func:`evaluate_task`.

    Returns:
        The results, and the reason for each task that was left out.

    Raises:
        RematchError: As for :func:`evaluate_task`.
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


def summary(results: Sequence[TaskResult], method: str = "embedding") -> dict[str, float]:
    """Means over tasks of each task's metric, Hit@1 or (of visual documents) nDCG@5, as of
    :func:`~rematch.evaluate.summary.task_means`.

    Args:
        results: The results of the tasks.
        method: The way of ranking.
    """
    values = [result.methods[method].scores[result.task.metric] for result in results]
    return task_means([result.task for result in results], values)
