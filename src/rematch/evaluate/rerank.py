"""Rerank candidates by the matching head: the first ones of a ranking, in the order of their
margins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util.distributed import get_rank, get_world_size

from rematch.encoding.encoder import joined
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
    """The first candidates of a query, which are reranked.

    Attributes:
        documents: Indices of the documents, best first, (T,).
        order: Their positions among all candidates of the query, relevant ones first, (T,).
        relevant: How many of all candidates are relevant.
    """

    documents: NDArray[np.int64]
    order: NDArray[np.int64]
    relevant: int


def rerank(
    model: ReMatch,
    queries: Forms,
    documents: Forms,
    rankings: Sequence[Ranking],
    view: View,
) -> list[NDArray[np.int64]]:
    """Each query's first candidates in their order after reranking, as positions among all
    candidates from best to worst, (T,).

    Under ``torchrun`` the processes share the queries. Equal margins never count in favour of a
    relevant document.

    Args:
        model: The model whose matching head scores the candidates.
        queries: The queries in each form.
        documents: The documents in each form.
        rankings: The first candidates of each query by embedding; the others keep their ranks.
        view: The view of the matching head.
    """

    def reorder_share() -> dict[int, NDArray[np.int64]]:
        orders: dict[int, NDArray[np.int64]] = {}
        numbers = range(get_rank(), len(rankings), get_world_size())
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            block_queries = [queries[view.query][i] for i in block]
            document_lists = [
                [documents[view.document][j] for j in rankings[i].documents] for i in block
            ]
            margins = model.score_lists(block_queries, document_lists, view)
            for i, query_margins in zip(block, margins, strict=True):
                orders[i] = _reordered(rankings[i], query_margins)
        return orders

    orders = joined(reorder_share)
    return [orders[i] for i in range(len(rankings))]


def _reordered(ranking: Ranking, margins: NDArray[np.float32]) -> NDArray[np.int64]:
    """The positions of a ranking in the order of their margins, (T,)."""
    by_position = np.argsort(ranking.order)  # relevant candidates first
    relevant = int((ranking.order < ranking.relevant).sum())
    return ranking.order[by_position[rank_candidates(margins[by_position], relevant)]]
