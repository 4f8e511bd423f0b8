"""Another ranking of the same candidates: P(yes) of the matching head for the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers.util.distributed import get_rank, get_world_size

from rematch.evaluate.metrics import Ranks, ranks_of_right
from rematch.matching import Form, View
from rematch.model import ReMatch

Pool = tuple[
    NDArray[np.int64], int, NDArray[np.int64]
]  # candidates, how many are right, their order by embedding
Forms = Mapping[Form, Sequence[Any] | NDArray[np.float32]]  # inputs as raw, vectors as feat


@dataclass(frozen=True)
class Reranking:
    """How far and with what: the first ``top`` candidates, in each of ``views``."""

    top: int = 10
    views: tuple[View, ...] = (View.RAW_RAW,)


def rerank(
    model: ReMatch, queries: Forms, documents: Forms, pools: Sequence[Pool], top: int, view: View
) -> Sequence[Ranks]:
    """Ranks of the right documents after the first candidates are ordered by their margins.

    Processes share the queries. Equal margins never count for a right document.

    Args:
        model: The model.
        queries: The queries in each form.
        documents: The documents in each form.
        pools: The candidates of each query.
        top: How many candidates are reranked; the others keep their places.
        view: The forms that the matching head reads.
    """
    ranks: dict[int, Ranks] = {}
    numbers = range(get_rank(), len(pools), get_world_size())
    for start in range(0, len(numbers), 16):
        block = numbers[start : start + 16]
        lists = [
            [documents[view.document][j] for j in pools[i][0][pools[i][2][:top]]] for i in block
        ]
        margins = model.score_lists([queries[view.query][i] for i in block], lists, view)
        for i, query_margins in zip(block, margins, strict=True):
            candidates, right, order = pools[i]
            scores = np.empty(len(candidates), np.float64)
            scores[order] = query_margins.min(initial=0.0) - np.arange(1, len(candidates) + 1)
            scores[order[:top]] = query_margins
            ranks[i] = ranks_of_right(scores, right)
    if get_world_size() > 1:
        shares: list[Any] = [None] * get_world_size()
        dist.all_gather_object(shares, ranks)
        ranks = {i: r for share in shares for i, r in share.items()}
    return [ranks[i] for i in range(len(pools))]
