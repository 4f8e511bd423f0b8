"""The three losses and their sum (paper.md "Idea").

``L = L_cl + w_orth · L_orth + w_qdm · L_qdm``

Shapes: B queries, M documents, N inputs, K learnable tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    queries: Tensor,
    documents: Tensor,
    temperature: float | Tensor,
    *,
    positives: Tensor | None = None,
    masked: Tensor | None = None,
    hardness: float = 0.0,
) -> Tensor:
    """L_cl, ``-log exp(cos(q_i, d_i)/τ) / Σ_j exp(cos(q_i, d_j)/τ)``, averaged over the queries.

    Args:
        queries: (B, D).
        documents: (M, D), M ≥ B; every document but a query's positive is a negative.
        temperature: τ; a number, or one for each query, (B, 1).
        positives: Row of each query's positive, (B,); by default the i-th document for query i.
        masked: True for documents that are not negatives of a query either, (B, M).
        hardness: β; a negative counts ``exp(β cos)`` times, so that hard ones count more.

    >>> round(info_nce(torch.eye(2), torch.eye(2), 1.0).item(), 4)
    0.3133
    """
    cosines = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    if positives is None:
        positives = torch.arange(len(queries), device=queries.device)
    is_positive = F.one_hot(positives, len(documents)).bool()
    scores = cosines / temperature
    if hardness:
        scores = scores + hardness * cosines.detach().masked_fill(is_positive, 0.0)
    if masked is not None:
        scores = scores.masked_fill(masked & ~is_positive, -torch.inf)
    return F.cross_entropy(scores, positives)


def orthogonality(multi_vectors: Tensor) -> Tensor:
    """L_orth, ``2 / (K(K-1)) · Σ_{i<j} (ẽ_i · ẽ_j)²`` with ``ẽ = e / ‖e‖``, averaged over inputs.

    Args:
        multi_vectors: (N, K, D); the loss is 0 for K = 1.

    >>> orthogonality(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).item()
    0.0
    >>> orthogonality(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])).item()
    1.0
    """
    if multi_vectors.shape[1] < 2:
        return multi_vectors.new_zeros(())
    return token_cosines(multi_vectors).pow(2).mean()


def token_cosines(multi_vectors: Tensor) -> Tensor:
    """``ẽ_i · ẽ_j`` of all pairs i < j: (N, K, D) → (N, K(K-1)/2)."""
    unit = F.normalize(multi_vectors, dim=-1)
    i, j = torch.triu_indices(unit.shape[1], unit.shape[1], offset=1)
    return (unit @ unit.mT)[:, i, j]


def matching_loss(logits: Tensor, relevant: Tensor, yes: int, no: int) -> Tensor:
    """L_qdm: next-token cross-entropy of Yes or No, averaged over the answer slots.

    Args:
        logits: Logits at the answer slots, (..., V).
        relevant: Whether the answer is Yes, (...).
        yes: Token id of Yes.
        no: Token id of No.
    """
    answers = torch.where(relevant, yes, no)
    return F.cross_entropy(logits.flatten(0, -2), answers.flatten())


def rematch_loss(
    queries: Tensor,
    documents: Tensor,
    logits: Tensor,
    relevant: Tensor,
    yes: int,
    no: int,
    *,
    temperature: float = 0.02,
    w_orth: float = 0.5,
    w_qdm: float = 0.1,
) -> Tensor:
    """The whole objective of one batch in one process.

    Training computes the same in mini-batches, with a gradient cache and over processes
    (:class:`rematch.ReMatchLoss`).

    Args:
        queries: Multi-vectors of the queries, (B, K, D).
        documents: Multi-vectors of the documents, positives first, (M, K, D).
        logits: As for :func:`matching_loss`; the other arguments too.
        relevant: Whether the answer is Yes, for each answer slot.
        yes: Token id of Yes.
        no: Token id of No.
        temperature: τ.
        w_orth: Weight of L_orth.
        w_qdm: Weight of L_qdm.
    """
    l_cl = info_nce(queries.mean(1), documents.mean(1), temperature)
    l_orth = orthogonality(torch.cat([queries, documents]))
    l_qdm = matching_loss(logits, relevant, yes, no)
    return l_cl + w_orth * l_orth + w_qdm * l_qdm
