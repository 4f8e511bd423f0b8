"""Another ranking of the same candidates: P(yes) of the matching head for the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers.util.distributed import get_rank, get_world_size

from rematch.evaluate.metrics import Ranks, ranks_of_right
from rematch.model import ReMatch

Pool = tuple[
    NDArray[np.int64], int, NDArray[np.int64]
]  # candidates, how many are right, their order by embedding
Side = tuple[Sequence[Any], NDArray[np.float32]]  # inputs and their vectors


@dataclass(frozen=True)
class Reranking:
    """How far and with what: the first ``top`` candidates, in each of ``views``."""

    top: int = 10
    views: tuple[str, ...] = ("raw-raw",)


def rerank(
    model: ReMatch, queries: Side, documents: Side, pools: Sequence[Pool], top: int, views: str
) -> Sequence[Ranks]:
    """Ranks of the right documents after the first ``top`` candidates were put in the order of
    their margins.

    A query's candidates share sequences under the unified mask, in which the query is computed
    once. Processes share the queries. Equal margins never count for a right document.
    """
    query_view, document_view = views.split("-")
    asked = queries[query_view == "feat"]
    given = documents[document_view == "feat"]
    found: dict[int, Ranks] = {}
    mine = range(get_rank(), len(pools), get_world_size())
    for start in range(0, len(mine), 16):
        block = mine[start : start + 16]
        pairs = [(i, j) for i in block for j in pools[i][0][pools[i][2][:top]]]
        by_query = {
            i: asked[i] for i in block
        }  # one object for all pairs of a query: they share a sequence
        judged = model.match_margins(
            [by_query[i] for i, _ in pairs], [given[j] for _, j in pairs], views
        )  # type: ignore[arg-type]
        at = 0
        for i in block:
            own, right, order = pools[i]
            first = order[:top]
            scores = np.empty(len(own), np.float64)
            scores[order] = judged.min(initial=0.0) - np.arange(
                1, len(own) + 1
            )  # those behind keep their places
            scores[first] = judged[at : at + len(first)]
            found[i] = ranks_of_right(scores, right)
            at += len(first)
    if get_world_size() > 1:
        shared: list[Any] = [None] * get_world_size()
        dist.all_gather_object(shared, found)
        found = {i: r for part in shared for i, r in part.items()}
    return [found[i] for i in range(len(pools))]
