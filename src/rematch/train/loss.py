"""The training loss: ``L = L_cl + w_orth · L_orth + w_qdm · L_qdm`` (paper.md "Idea").

- :func:`info_nce` (L_cl): a query against every document of the batch, hard negatives included;
- :func:`orthogonality` (L_orth): the K token vectors of an input keep apart;
- matching (L_qdm): next-token cross-entropy on Yes/No for every view pair, in one forward
  (:mod:`rematch.matching`).

Shapes: B samples, K learnable tokens, D width, A answer slots.
"""

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from rematch.backbone.pictures import Pictures, Seen
from rematch.matching import VIEWS
from rematch.model import ReMatch
from rematch.tokens import fuse
from rematch.train.batch import Batch, Step
from rematch.train.parallel import (
    aligned,
    first_row,
    gather,
    largest,
    mean_over_processes,
    piling_up,
    touch,
)


def info_nce(
    queries: Tensor,
    documents: Tensor,
    temperature: float | Tensor,
    *,
    first: int = 0,
    masked: Tensor | None = None,
    hardness: float = 0.0,
    largest: int = 1 << 24,
) -> Tensor:
    """``-log exp(cos(q_i, d_i)/τ) / Σ_j exp(cos(q_i, d_j)/τ)``, mean over the queries.

    Args:
        queries: (B, D).
        documents: (M, D), M ≥ B; number ``first`` + i is the i-th query's positive, the others are
            negatives.
        temperature: τ; one for all, or each query's own, (B, 1).
        first: Where this process's positives begin among the documents of all.
        masked: True for documents that are no negatives of a query although they are not its
            positive, (B, M).
        hardness: β; a negative counts ``exp(β cos)`` times, so that hard ones count more.
        largest: Scores in memory at once; more queries are worked off in turns, again in the
            backward pass.

    >>> round(info_nce(torch.eye(2), torch.eye(2), 1.0).item(), 4)
    0.3133
    """
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    targets = first + torch.arange(len(queries), device=queries.device)

    def total(
        queries: Tensor, targets: Tensor, masked: Tensor | None, temperature: float | Tensor
    ) -> Tensor:
        cosines = queries @ documents.T
        scores = cosines / temperature
        positive = F.one_hot(targets, len(documents)).bool()
        if hardness:
            scores = scores + hardness * cosines.detach().masked_fill(positive, 0.0)
        if masked is not None:
            scores = scores.masked_fill(masked & ~positive, -torch.inf)
        return F.cross_entropy(scores, targets, reduction="sum")

    rows = max(1, largest // len(documents))
    if rows >= len(queries):
        return total(queries, targets, masked, temperature) / len(queries)
    losses = []
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        some = None if masked is None else masked[part]
        tau = (
            temperature[part]
            if isinstance(temperature, Tensor) and temperature.ndim
            else temperature
        )
        losses.append(
            checkpoint(total, queries[part], targets[part], some, tau, use_reentrant=False)
        )
    return torch.stack(losses).sum() / len(queries)


def orthogonality(multi_vector: Tensor) -> Tensor:
    """``2 / (K(K-1)) · Σ_{i<j} (ẽ_i · ẽ_j)²`` with ``ẽ = e / ‖e‖``, mean over the inputs; 0 for K
    = 1.

    Args:
        multi_vector: (B, K, D).

    >>> orthogonality(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).item()
    0.0
    >>> orthogonality(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])).item()
    1.0
    """
    if multi_vector.shape[1] < 2:
        return multi_vector.new_zeros(())
    return token_cosines(multi_vector).pow(2).mean()


def token_cosines(multi_vector: Tensor) -> Tensor:
    """``ẽ_i · ẽ_j`` of all pairs i < j: (B, K, D) → (B, K(K-1)/2)."""
    unit = F.normalize(multi_vector, dim=-1)
    i, j = torch.triu_indices(unit.shape[1], unit.shape[1], offset=1)
    return (unit @ unit.mT)[:, i, j]


Replay = tuple[
    Step, float, RandContext
]  # a forward pass, its weight, and the random state to repeat it in


class ReMatchLoss(nn.Module):
    """The three losses on a :class:`~rematch.train.collator.Batch`.

    Calling it returns the weighted parts by name; sentence-transformers' trainer adds them up and
    logs each. Each part can be switched off: no ``negative`` column, ``w_orth=0``, ``w_qdm=0``
    (the matching forwards are not run then).

    With ``gradient_cache`` the activations of one mini-batch are in memory at a time
    (https://arxiv.org/abs/2101.06983):

    1. embed every mini-batch without a graph, remembering the state of the random generators;
    2. all losses from the vectors; the gradient goes back to the vectors;
    3. in the backward pass, matching runs once more with a graph and adds its gradient of the
       vectors (it reads them as ``Z*``), then every mini-batch is embedded once more with a graph,
       and the vectors' gradient goes on from there.

    Args:
        model: The model in training.
        temperature: τ of InfoNCE.
        w_orth: Weight of the orthogonality penalty.
        w_qdm: Weight of the matching loss.
        views: The view pairs that are asked, as in the collator; each for d+ and d-.
        gradient_cache: Bound the memory by the mini-batch instead of the batch, for one more
            forward pass.
        learn_temperature: Train τ, from ``temperature`` on.
        mask_duplicates: A document identical to a query's positive is no negative of it; nor, with
            ``symmetric``, is an identical query, or one with the same positive, a negative of a
            positive.
        symmetric: Add InfoNCE from each positive to all queries, and halve the sum.
        hardness: β of :func:`info_nce`.
        matryoshka: Widths at which InfoNCE is taken besides the whole one, all averaged.
        features_gb: GiB of a frozen vision tower's features that are kept during a step; if they
            take more, the tower runs again in every forward pass.
        largest: Scores in memory at once, as for :func:`info_nce`.
    """

    def __init__(
        self,
        model: ReMatch,
        *,
        temperature: float = 0.02,
        w_orth: float = 0.5,
        w_qdm: float = 0.1,
        views: Sequence[str] = VIEWS,
        gradient_cache: bool = False,
        learn_temperature: bool = False,
        mask_duplicates: bool = False,
        symmetric: bool = False,
        hardness: float = 0.0,
        matryoshka: Sequence[int] = (),
        features_gb: float = 4.0,
        largest: int = 1 << 24,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.log_temperature = (
            nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        )
        if self.log_temperature is not None:
            self.log_temperature.register_hook(mean_over_processes)  # type: ignore[no-untyped-call]
        self.w_orth = w_orth
        self.w_qdm = w_qdm
        self.views = tuple(views)
        self.gradient_cache = gradient_cache
        self.mask_duplicates = mask_duplicates
        self.symmetric = symmetric
        self.hardness = hardness
        self.matryoshka = tuple(matryoshka)
        self.features_gb = features_gb
        self.largest = largest
        self._right: list[Tensor] = []
        self._cosines: list[Tensor] = []

    def forward(self, features: Sequence[Any], labels: Tensor | None = None) -> dict[str, Tensor]:
        batch = features[0]
        embedding_steps, matching_steps = self.schedule(batch)
        seen = self.see(batch)
        if self.gradient_cache and torch.is_grad_enabled():
            return self._forward_cached(batch, seen, embedding_steps, matching_steps)
        embedded = [(self.embed(step, batch, seen), weight) for step, weight in embedding_steps]
        idle = sum(
            (one.sum() * 0.0 for (one, _), weight in embedded if not weight),
            start=touch(self.model),
        )
        multi = torch.cat([one for (one, _), weight in embedded if weight])
        parts = self.contrast(multi, batch)
        parts["contrastive"] = parts["contrastive"] + idle
        shares = [share * weight for (_, share), weight in embedded if share is not None]
        if self.w_qdm:
            vectors = fuse(multi)
            shares += [
                self.match(step, batch, seen, vectors) * weight for step, weight in matching_steps
            ]
        if shares:
            parts["matching"] = torch.stack(shares).sum()
        return parts

    # ---- the parts ------------------------------------------------------------------------------

    def contrast(self, multi: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_cl and ``w_orth`` · L_orth from the multi-vectors of all distinct inputs, (N, K, D)."""
        with torch.autocast(
            multi.device.type, enabled=False
        ):  # cosines of half precision are too coarse for τ = 0.02
            return self._contrast(multi, batch)

    def _contrast(self, multi: Tensor, batch: Batch) -> dict[str, Tensor]:
        inputs = batch.inputs.to(multi.device)
        vectors, keys = fuse(multi), batch.keys.to(multi.device)
        queries = vectors[inputs[:, 0]]  # E*, (B, D)
        documents = torch.cat(
            [gather(vectors[column]) for column in inputs.T[1:]]
        )  # of all processes, (M, D)
        masked = masked_back = None
        if self.mask_duplicates:
            others = torch.cat([gather(keys[column]) for column in inputs.T[1:]])
            masked = keys[inputs[:, 1]][:, None] == others[None]
            masked_back = (
                keys[inputs[:, 1]][:, None] == gather(keys[inputs[:, 1]])[None]
            )  # queries of that positive
            masked_back |= (
                keys[inputs[:, 0]][:, None] == gather(keys[inputs[:, 0]])[None]
            )  # the same query again
        first = first_row(len(queries))
        options: dict[str, Any] = {
            "first": first,
            "hardness": self.hardness,
            "largest": self.largest,
        }
        tau: float | Tensor = self.temperature
        if self.log_temperature is not None:
            tau = self.log_temperature.exp()
        elif batch.temperatures is not None:
            tau = batch.temperatures[:, None].to(multi)
        losses = []
        for width in (*self.matryoshka, vectors.shape[1]):
            loss = info_nce(
                queries[:, :width], documents[:, :width], tau, masked=masked, **options
            )
            if self.symmetric:
                positives = vectors[inputs[:, 1], :width]
                back = info_nce(
                    positives, gather(queries[:, :width]), tau, masked=masked_back, **options
                )
                loss = (loss + back) / 2
            losses.append(loss)
        parts = {"contrastive": torch.stack(losses).mean()}
        if multi.shape[1] > 1 and torch.is_grad_enabled():
            self._cosines.append(token_cosines(multi.detach()).abs().mean())
        if self.w_orth:
            parts["orthogonality"] = self.w_orth * orthogonality(multi[inputs.T.flatten()])
        return parts

    def embed(
        self, step: Step, batch: Batch, seen: list[Seen] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Multi-vectors of the inputs of one step, (n, K, D); and in ``reuse`` mode its share of
        ``w_qdm`` · L_qdm.
        """
        features = self._features(step, batch, seen)
        if not step.parts:
            return self.model(features)["multi_vector"], None
        relevant = features.pop("relevant")
        out = self.model(features)
        return out["multi_vector"], self.answers(out["answer_logits"], relevant, batch)

    def match(self, step: Step, batch: Batch, seen: list[Seen] | None, vectors: Tensor) -> Tensor:
        """A matching step's share of ``w_qdm`` · L_qdm.

        Args:
            step: One of the batch's matching steps.
            batch: The batch.
            seen: Of :meth:`see`.
            vectors: E* of all distinct inputs, (N, D).
        """
        features = self._features(step, batch, seen)
        relevant, read = features.pop("relevant"), features.pop("read")
        features["vectors"] = vectors[read] if len(read) else None
        return self.answers(self.model(features)["answer_logits"], relevant, batch)

    def answers(self, logits: Tensor, relevant: Tensor, batch: Batch) -> Tensor:
        """Next-token cross-entropy of Yes for d+ and No for d- at some answer slots, over the
        number of all.

        Args:
            logits: (b, A, V), for every view pair both document slots.
            relevant: Whether each slot's document is d+, (b, 2).
            batch: The batch.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        yes, no = self.backbone.answer_ids
        wanted = relevant.repeat(1, len(self.views))  # (b, A)
        right = (
            ((logits[..., yes] > logits[..., no]) == wanted).detach().view(-1, len(self.views), 2)
        )
        positive_first = (~relevant).int().argsort(dim=1, stable=True)[:, None]
        if torch.is_grad_enabled():  # not in the cache's first pass, nor on validation data
            self._right.append(
                right.gather(2, positive_first.expand_as(right))
            )  # (b, views, 2): d+, d-
        total: Tensor = F.cross_entropy(
            logits.flatten(0, 1), torch.where(wanted, yes, no).flatten(), reduction="sum"
        )
        share: Tensor = total * (self.w_qdm / (len(batch.inputs) * wanted.shape[1]))
        return share

    def schedule(self, batch: Batch) -> tuple[list[tuple[Step, float]], list[tuple[Step, float]]]:
        """The embedding and the matching steps with their weights, as many in every process."""
        matching = batch.matching if self.w_qdm else []
        counts = largest([len(batch.embedding), len(matching)], self.backbone.model.device)
        return aligned(batch.embedding, counts[0]), aligned(matching, counts[1])

    def see(self, batch: Batch) -> list[Seen] | None:
        """What a frozen vision tower makes of the batch's distinct pictures, run once.

        ``None`` if the tower trains, or if its features take more than ``features_gb`` in some
        process: every step then runs the tower on its own pictures.
        """
        backbone = self.backbone
        if backbone.trains_vision:
            return None
        pictures = batch.pictures
        chunks = pictures.chunks(batch.budget) if pictures else []
        size = backbone.feature_bytes(sum(pictures.tokens)) if pictures else 0
        count, too_large = largest(
            [len(chunks), int(size > self.features_gb * 2**30)], backbone.model.device
        )
        if too_large:
            return None
        seen: list[Seen] = []
        idle = self.blank if count > len(chunks) else None  # all processes run the tower as often
        with torch.no_grad():
            for shown, weight in aligned(
                [pictures.take(chunk) for chunk in chunks] if pictures else [], count, idle
            ):
                features = self.model({"pictures": shown})["seen"]
                seen += features if weight else []
        return seen

    @property
    def backbone(self) -> Any:
        """The backbone of the model, which a trainer may have wrapped."""
        model: Any = getattr(self.model, "module", self.model)
        return model.backbone

    def _features(self, step: Step, batch: Batch, seen: list[Seen] | None) -> dict[str, Any]:
        """A step's inputs on the model's device, its pictures seen already or to be seen with it."""
        device = self.backbone.model.device
        features: dict[str, Any] = {name: value.to(device) for name, value in step.tensors.items()}
        parts = step.parts or [step]
        sets = [number for part in parts for number in part.sets]
        if seen is not None:
            features["seen"] = [seen[i] for i in sets]
        elif sets and batch.pictures is not None:
            features["unseen"] = batch.pictures.take(sets)
        elif isinstance(self.model, FSDPModule):
            features["idle"] = self.blank
        if step.parts:
            features["parts"] = [
                {n: v.to(device) for n, v in part.tensors.items()} for part in parts
            ]
            features["shown"] = [len(part.sets) for part in parts]
        return features

    @cached_property
    def blank(self) -> Pictures:
        """A blank picture for a process without pictures: a sharded tower runs in all processes
        together.
        """
        reading = self.backbone.reader.read(Image.new("RGB", (64, 64), "white"))
        return Pictures.collect([reading.vision], [reading.visual_tokens])

    # ---- gradient cache -------------------------------------------------------------------------

    def _forward_cached(
        self,
        batch: Batch,
        seen: list[Seen] | None,
        embedding_steps: list[tuple[Step, float]],
        matching_steps: list[tuple[Step, float]],
    ) -> dict[str, Tensor]:
        device = torch.empty(0, device=self.backbone.model.device)
        embedding: list[Replay] = []
        matching: list[Replay] = []
        with torch.no_grad():
            embedded = []
            for step, weight in embedding_steps:
                embedding.append((step, weight, RandContext(device)))
                out = self.embed(step, batch, seen)
                embedded += [out] if weight else []
            multi = torch.cat([one for one, _ in embedded]).requires_grad_()
        parts = self.contrast(multi, batch)
        own = [p for p in (self.log_temperature,) if p is not None]
        gradient, *own_gradients = torch.autograd.grad(
            torch.stack(list(parts.values())).sum(), [multi, *own]
        )
        shares = [share for _, share in embedded if share is not None]
        with torch.no_grad():
            fused = fuse(multi)
            for step, weight in matching_steps:
                matching.append((step, weight, RandContext(device)))
                shares.append(self.match(step, batch, seen, fused) * weight)
        if shares:
            parts["matching"] = torch.stack(shares).sum()
        parts = {name: value.detach() for name, value in parts.items()}
        hook = partial(
            self._backward_cached,
            batch=batch,
            seen=seen,
            vectors=fused,
            gradient=gradient,
            embedding=embedding,
            matching=matching,
        )
        carrier = parts[
            "contrastive"
        ].requires_grad_()  # whatever the parts are added up to has gradient 1 here
        carrier.register_hook(hook)  # type: ignore[no-untyped-call]
        for parameter, own_gradient in zip(own, own_gradients, strict=True):
            parts["contrastive"] = parts["contrastive"] + own_gradient * (
                parameter - parameter.detach()
            )
        return parts

    @torch.enable_grad()
    def _backward_cached(
        self,
        outer: Tensor,
        *,
        batch: Batch,
        seen: list[Seen] | None,
        vectors: Tensor,
        gradient: Tensor,
        embedding: list[Replay],
        matching: list[Replay],
    ) -> None:
        """Step 3, scaled by ``outer``, the gradient that the loss itself receives (fp16 scale,
        accumulation).
        """
        leaf = vectors.clone().requires_grad_()
        for step, weight, state in matching:
            with state, piling_up(self.model):
                torch.autograd.backward(self.match(step, batch, seen, leaf) * (outer * weight))
        gradient = gradient * outer
        if leaf.grad is not None:  # None if no view reads the vectors
            gradient = (
                gradient + leaf.grad[:, None] / gradient.shape[1]
            )  # E* is the mean of the K vectors
        gradients = list(torch.split(gradient, [step.size for step in batch.embedding]))
        gradients += [torch.zeros_like(gradients[-1])] * (len(embedding) - len(gradients))
        for i, (step, weight, state) in enumerate(embedding):
            last = i == len(embedding) - 1
            with state, piling_up(self.model, last):
                multi, share = self.embed(step, batch, seen)
                surrogate = (multi * gradients[i]).sum() + (touch(self.model) if last else 0.0)
                surrogate = surrogate if share is None else surrogate + share * (outer * weight)
                torch.autograd.backward(surrogate)

    def pop_metrics(self) -> dict[str, float]:
        """Since the last call: Yes/No accuracy in percent for each view pair with d+ and with d-,
        and the mean |cosine| between the token vectors of an input.
        """
        found = {}
        if self._cosines:
            found["token_cosine"] = round(torch.stack(self._cosines).mean().item(), 4)
            self._cosines.clear()
        if not self._right:
            return found
        mean = torch.cat(self._right).float().mean(0).tolist()
        self._right.clear()
        return found | {
            f"match_accuracy/{view}/{document}": round(100 * value, 2)
            for view, pair in zip(self.views, mean, strict=True)
            for document, value in zip(("positive", "negative"), pair, strict=True)
        }
