"""Which candidates are hard negatives, and which are false negatives.

The documents nearest to a query are its hardest negatives, but some of them are correct answers
that nobody labelled: false negatives. The model that ranked the documents also judges them: the
matching head gives each a P(yes). A candidate is dropped if that is high, or close to that of the
labelled positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.util import dot_score, semantic_search

from rematch.data.schema import Item
from rematch.matching import View
from rematch.model import ReMatch
from rematch.scoring import probability

REASONS = {
    "kept": "kept as hard negatives",
    "surplus": "dropped: the query has enough negatives",
    "positive": "dropped: labelled as a positive of the query",
    "query": "dropped: identical to the query",
    "yes": "dropped as false negatives: the matching head says Yes",
    "margin": "dropped as false negatives: P(yes) is too close to the positive's",
}


@dataclass(frozen=True)
class Rules:
    """What counts as a hard negative.

    Attributes:
        negatives: Maximum number of negatives per query; the nearest are kept.
        candidates: Number of nearest documents to judge per query.
        yes: P(yes) from which a candidate is a false negative.
        margin: Distance that a candidate's P(yes) must keep below that of the query's positive
            (the least likely one, if there are several); a candidate that is closer is a false
            negative.
        view: View of the matching head.
    """

    negatives: int = 4
    candidates: int = 30
    yes: float = 0.5
    margin: float = 0.0
    view: View = View.FEAT_FEAT


@dataclass(frozen=True)
class Pool:
    """The distinct queries and documents of a mining run.

    Attributes:
        queries: N queries.
        documents: M documents, the positives among them.
        positives: For each query the indices of its positives, at least one.
        twins: For each query the index of the document with the same content, or ``None``.
        duplicates: Number of documents left out because another one has the same content.
        digest: Digest of all contents.
    """

    queries: list[Item]
    documents: list[Item]
    positives: list[list[int]]
    twins: list[int | None]
    duplicates: int
    digest: str


@dataclass(frozen=True)
class Inputs:
    """The queries and documents of a pool as the model takes them, and their embeddings.

    Attributes:
        queries: N inputs.
        documents: M inputs.
        query_vectors: Embeddings, (N, D).
        document_vectors: Embeddings, (M, D).
    """

    queries: list[Any]
    documents: list[Any]
    query_vectors: NDArray[np.float32]
    document_vectors: NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """A document near a query, and what became of it.

    Attributes:
        document: Index of the document.
        cosine: Its cosine with the query.
        p_yes: P(yes) of the pair; ``None`` if the matching head was not asked.
        reason: A key of ``REASONS``.
    """

    document: int
    cosine: float
    p_yes: float | None
    reason: str


@dataclass(frozen=True)
class JudgedQuery:
    """A query with its candidates.

    Attributes:
        query: Index of the query.
        positive_p_yes: P(yes) of its least likely positive.
        candidates: Those dropped by their content first, then the judged ones; the nearest first.
    """

    query: int
    positive_p_yes: float
    candidates: list[Candidate]


def judge(
    model: ReMatch, pool: Pool, inputs: Inputs, queries: Sequence[int], rules: Rules
) -> list[JudgedQuery]:
    """Find and judge the candidates of a block of queries.

    Args:
        model: The model that judges.
        pool: All queries and documents.
        inputs: Inputs and embeddings of the pool.
        queries: Indices of the queries.
        rules: What counts as a hard negative.
    """
    # enough that positives and the query itself leave the wanted number to judge
    count = rules.candidates + max(map(len, pool.positives)) + 1
    neighbours = _nearest(inputs.query_vectors[list(queries)], inputs.document_vectors, count)
    dropped, unjudged = [], []
    for query, hits in zip(queries, neighbours, strict=True):
        reasons: dict[int | None, str] = {pool.twins[query]: "query"}
        reasons |= dict.fromkeys(pool.positives[query], "positive")
        dropped.append(
            [Candidate(j, cosine, None, reasons[j]) for j, cosine in hits if j in reasons]
        )
        others = [(j, cosine) for j, cosine in hits if j not in reasons]
        unjudged.append(others[: rules.candidates])
    lists = [
        [*pool.positives[query], *(j for j, _ in hits)]
        for query, hits in zip(queries, unjudged, strict=True)
    ]
    judged = []
    for i, p_yes in enumerate(_p_yes(model, inputs, queries, lists, rules.view)):
        positives = len(pool.positives[queries[i]])
        positive_p_yes = min(p_yes[:positives])
        candidates = _apply_rules(unjudged[i], p_yes[positives:], positive_p_yes, rules)
        judged.append(JudgedQuery(queries[i], positive_p_yes, [*dropped[i], *candidates]))
    return judged


def _nearest(
    queries: NDArray[np.float32], documents: NDArray[np.float32], count: int
) -> list[list[tuple[int, float]]]:
    """For each query the nearest documents as (index, cosine), nearest first."""
    hits_of_queries = semantic_search(
        torch.from_numpy(queries),
        torch.from_numpy(documents),
        top_k=min(count, len(documents)),
        score_function=dot_score,
    )
    return [[(int(h["corpus_id"]), float(h["score"])) for h in hits] for hits in hits_of_queries]


def _p_yes(
    model: ReMatch,
    inputs: Inputs,
    queries: Sequence[int],
    document_lists: list[list[int]],
    view: View,
) -> list[list[float]]:
    """P(yes) of each query with each document of its list."""
    query_source: list[Any] | NDArray[np.float32] = inputs.queries
    document_source: list[Any] | NDArray[np.float32] = inputs.documents
    if view.query == "feat":
        query_source = inputs.query_vectors
    if view.document == "feat":
        document_source = inputs.document_vectors
    margins = model.score_lists(
        [query_source[query] for query in queries],
        [[document_source[j] for j in documents] for documents in document_lists],
        view,
    )
    return [probability(values).tolist() for values in margins]


def _apply_rules(
    hits: list[tuple[int, float]], p_yes: list[float], positive_p_yes: float, rules: Rules
) -> list[Candidate]:
    candidates = []
    negatives = 0
    for (document, cosine), p in zip(hits, p_yes, strict=True):
        if p >= rules.yes:
            reason = "yes"
        elif p > positive_p_yes - rules.margin:
            reason = "margin"
        elif negatives < rules.negatives:
            reason = "kept"
            negatives += 1
        else:
            reason = "surplus"
        candidates.append(Candidate(document, cosine, p, reason))
    return candidates
