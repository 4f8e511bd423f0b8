"""Rerank candidates by the matching head: the first ones of a ranking, in the order of their
margins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers.util.distributed import get_rank, get_world_size

from rematch.evaluate.metrics import rank_candidates
from rematch.matching import Form, View
from rematch.model import ReMatch

Forms = Mapping[Form, Sequence[Any] | NDArray[np.float32]]  # inputs as raw, vectors as feat
_BLOCK = 16  # queries that are scored together


@dataclass(frozen=True)
class Reranking:
    """How candidates are reranked.

    Attributes:
        top: How many candidates are reranked.
        views: The views of the matching head, each of which gives a ranking of its own.
    """

    top: int = 10
    views: tuple[View, ...] = (View.RAW_RAW,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(View(view) for view in self.views))


@dataclass(frozen=True)
class Ranking:
    """The candidates of a query, ranked.

    Attributes:
        candidates: Indices of documents, the relevant ones first, (C,).
        relevant: How many candidates are relevant.
        order: Positions in ``candidates`` from best to worst, (C,).
    """

    candidates: NDArray[np.int64]
    relevant: int
    order: NDArray[np.int64]


def rerank(
    model: ReMatch,
    queries: Forms,
    documents: Forms,
    rankings: Sequence[Ranking],
    top: int,
    view: View,
) -> list[NDArray[np.int64]]:
    """Each query's candidates in their order after reranking, as positions from best to worst.

    Under ``torchrun`` the processes share the queries. Equal margins never count in favour of a
    relevant document.

    Args:
        model: The model whose matching head scores the candidates.
        queries: The queries in each form.
        documents: The documents in each form.
        rankings: The ranking of each query by embedding.
        top: How many candidates are reranked; the others keep their ranks.
        view: The view of the matching head.
    """
    orders: dict[int, NDArray[np.int64]] = {}
    numbers = range(get_rank(), len(rankings), get_world_size())
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        document_lists = []
        for i in block:
            best = rankings[i].candidates[rankings[i].order[:top]]
            document_lists.append([documents[view.document][j] for j in best])
        margins = model.score_lists([queries[view.query][i] for i in block], document_lists, view)
        for i, query_margins in zip(block, margins, strict=True):
            scores = _merged_scores(rankings[i].order, query_margins)
            orders[i] = rank_candidates(scores, rankings[i].relevant)
    if get_world_size() > 1:
        shares: list[Any] = [None] * get_world_size()
        dist.all_gather_object(shares, orders)
        orders = {i: order for share in shares for i, order in share.items()}
    return [orders[i] for i in range(len(rankings))]


def _merged_scores(order: NDArray[np.int64], margins: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores of a query's candidates, (C,): margins of the first ones, and for the others scores
    below all margins that keep their order.
    """
    scores = np.empty(len(order), np.float64)
    scores[order] = margins.min(initial=0.0) - np.arange(1, len(order) + 1)
    scores[order[: len(margins)]] = margins
    return scores
