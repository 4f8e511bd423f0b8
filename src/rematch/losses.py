"""The training loss: ``L = L_cl + w_orth · L_orth + w_qdm · L_qdm`` (paper.md "Idea").

- :func:`info_nce` (L_cl): a query against every document of the batch, hard negatives included;
- :func:`orthogonality` (L_orth): the K token vectors of an input keep apart;
- matching (L_qdm): next-token cross-entropy on Yes/No for every view pair, in one forward (:mod:`rematch.matching`).

Shapes: B samples, K learnable tokens, D width, A answer slots.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematch.matching import VIEWS, Packed
from rematch.model import ReMatch
from rematch.tokens import fuse


def info_nce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """``-log exp(cos(q_i, d_i)/τ) / Σ_j exp(cos(q_i, d_j)/τ)``, mean over the queries.

    Args:
        queries: (B, D).
        documents: (M, D), M ≥ B; the i-th is the i-th query's positive, the others are negatives.
        temperature: τ.

    >>> round(info_nce(torch.eye(2), torch.eye(2), 1.0).item(), 4)
    0.3133
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def orthogonality(multi_vector: Tensor) -> Tensor:
    """``2 / (K(K-1)) · Σ_{i<j} (ẽ_i · ẽ_j)²`` with ``ẽ = e / ‖e‖``, mean over the inputs; 0 for K = 1.

    Args:
        multi_vector: (B, K, D).

    >>> orthogonality(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).item()
    0.0
    >>> orthogonality(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])).item()
    1.0
    """
    k = multi_vector.shape[1]
    if k < 2:
        return multi_vector.new_zeros(())
    unit = F.normalize(multi_vector, dim=-1)
    cosines = unit @ unit.mT  # (B, K, K)
    i, j = torch.triu_indices(k, k, offset=1)
    return cosines[:, i, j].pow(2).mean()


class ReMatchLoss(nn.Module):
    """The three losses on one batch of query, positive, (negative,) and matching features.

    Calling it returns the weighted parts by name; sentence-transformers' trainer adds them up and logs each. Each part
    can be switched off: no ``negative`` column, ``w_orth=0``, ``w_qdm=0`` (the matching forward is not run then).

    Args:
        model: The model in training.
        temperature: τ of InfoNCE.
        w_orth: Weight of the orthogonality penalty.
        w_qdm: Weight of the matching loss.
        views: The view pairs that are asked, as in the collator; each for d+ and d-.
    """

    def __init__(
        self,
        model: ReMatch,
        *,
        temperature: float = 0.02,
        w_orth: float = 0.5,
        w_qdm: float = 0.1,
        views: Sequence[str] = VIEWS,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.w_orth = w_orth
        self.w_qdm = w_qdm
        self.views = tuple(views)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # the trainer's, under mixed precision
        self._right: list[Tensor] = []

    def forward(self, features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        columns = [column for column in features if "slots" not in column]
        multi = [self.model(dict(column))["multi_vector"] for column in columns]  # query, positive, …: (B, K, D) each
        queries, *documents = (fuse(m) for m in multi)  # E*, (B, D) each
        parts = {"contrastive": info_nce(queries, torch.cat(documents), self.temperature)}
        if self.w_orth:
            parts["orthogonality"] = self.w_orth * orthogonality(torch.cat(multi))
        matching = [column for column in features if "slots" in column]
        if self.w_qdm and matching:
            parts["matching"] = self.w_qdm * self.matching(matching[0], queries, documents)
        return parts

    def matching(self, features: dict[str, Any], queries: Tensor, documents: Sequence[Tensor]) -> Tensor:
        """L_qdm: next-token cross-entropy of Yes for d+ and No for d- at every answer slot, mean over the slots.

        Args:
            features: The packed batch of :class:`rematch.train.collator.Collator`: slots in the order of the views,
                both document slots for each.
            queries: E* of the queries, (B, D).
            documents: E* of the positives, and of the hard negatives if there are any, (B, D) each.
        """
        features = dict(features)
        order = features.pop("order")  # (B, 2): the document (0: d+, 1: d-) that stands in each slot
        negative_row = features.pop("negative_row")  # (B,): without hard negatives, whose positive serves as d-
        negatives = documents[1] if len(documents) > 1 else documents[0][negative_row]
        pair = torch.stack([documents[0], negatives], dim=1)  # (B, 2, D)
        pair = pair.gather(1, order[..., None].expand_as(pair))
        read = [queries[:, None]] if any(v.startswith("feat") for v in self.views) else []
        read += [pair] if any(v.endswith("feat") for v in self.views) else []
        z = self.model.fusion.projector(torch.cat(read, dim=1).flatten(0, 1)) if read else None  # in reading order

        names = [field.name for field in dataclasses.fields(Packed)]
        packed = Packed(**{name: features.pop(name) for name in names})
        with self.autocast():
            logits = self.model.backbone.answer_logits(packed, features, z)  # (B, A, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        relevant = (order == 0).repeat(1, len(self.views))  # (B, A)
        yes, no = self.model.backbone.answer_ids
        right = ((logits[..., yes] > logits[..., no]) == relevant).detach().unflatten(1, (len(self.views), 2))
        self._right.append(right.gather(2, order.argsort(1)[:, None].expand_as(right)))  # (B, views, 2): d+, d-
        return F.cross_entropy(logits.flatten(0, 1), torch.where(relevant, yes, no).flatten())

    def pop_accuracy(self) -> dict[str, float]:
        """Yes/No accuracy in percent since the last call, for each view pair with d+ and with d-; empty if none."""
        if not self._right:
            return {}
        mean = torch.cat(self._right).float().mean(0).tolist()
        self._right.clear()
        return {
            f"match_accuracy/{view}/{document}": round(100 * value, 2)
            for view, pair in zip(self.views, mean, strict=True)
            for document, value in zip(("positive", "negative"), pair, strict=True)
        }
