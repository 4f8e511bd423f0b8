"""The training loss: the losses of :mod:`rematch.losses` with the settings of a recipe."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rematch.losses import info_nce, matching_loss, orthogonality, token_cosines
from rematch.matching import View
from rematch.model import ReMatch
from rematch.train.batch import Batch
from rematch.train.gradient_cache import Contrast, MiniBatchedLoss, Passes
from rematch.train.parallel import mean_over_processes


class ReMatchLoss(MiniBatchedLoss):
    """The weighted losses of a :class:`~rematch.train.batch.Batch`, by name.

    sentence-transformers' trainer adds them up and logs each. Each part can be switched off: no
    ``negative`` column, ``w_orth=0``, or ``w_qdm=0``, which leaves out the passes for matching.

    Args:
        model: The model in training.
        temperature: τ of InfoNCE.
        w_orth: Weight of the orthogonality penalty.
        w_qdm: Weight of the matching loss.
        views: The views that are asked about, as in the collator; each for d+ and d-.
        gradient_cache: Bound the memory by the mini-batch instead of the batch, for one more
            forward pass (:mod:`rematch.train.gradient_cache`).
        learn_temperature: Train τ, starting from ``temperature``.
        mask_duplicates: A document identical to a query's positive is not a negative of the query;
            nor, with ``symmetric``, is an identical query, or one with the same positive, a
            negative of a positive.
        symmetric: Average InfoNCE from queries to documents and from positives to queries.
        hardness: β of :func:`~rematch.losses.info_nce`.
        matryoshka: Widths at which InfoNCE is computed besides the full one; all are averaged.
        features_gb: GiB of features of a frozen vision tower that are kept during a step; if they
            take more, the tower runs again in every forward pass.
        max_scores: Scores of InfoNCE in memory at once; beyond it, queries are processed in chunks
            and computed again in the backward pass.
    """

    def __init__(
        self,
        model: ReMatch,
        *,
        temperature: float = 0.02,
        w_orth: float = 0.5,
        w_qdm: float = 0.1,
        views: Sequence[View | str] = tuple(View),
        gradient_cache: bool = False,
        learn_temperature: bool = False,
        mask_duplicates: bool = False,
        symmetric: bool = False,
        hardness: float = 0.0,
        matryoshka: Sequence[int] = (),
        features_gb: float = 4.0,
        max_scores: int = 1 << 24,
    ) -> None:
        super().__init__(model, gradient_cache, features_gb)
        self.temperature = temperature
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
            log_temperature.register_hook(mean_over_processes)  # type: ignore[no-untyped-call]
            self.log_temperature = log_temperature
        self.w_orth = w_orth
        self.w_qdm = w_qdm
        self.views = [View(view) for view in views]
        self.mask_duplicates = mask_duplicates
        self.symmetric = symmetric
        self.hardness = hardness
        self.matryoshka = tuple(matryoshka)
        self.max_scores = max_scores
        self._correct: list[Tensor] = []  # answers, (b, views, 2): d+ and d-
        self._cosines: list[Tensor] = []  # mean |cosine| between the token vectors of an input

    @property
    def shows_embeddings(self) -> bool:
        """Whether any question shows an embedding, so that the projector has a gradient."""
        forms = {form for view in self.views for form in (view.query, view.document)}
        return self.w_qdm > 0 and "feat" in forms

    def passes(self, batch: Batch) -> Passes:
        return super().passes(batch if self.w_qdm else replace(batch, matching=[]))

    def contrast(self, multi_vectors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_cl and ``w_orth`` · L_orth of the multi-vectors of the distinct inputs, (N, K, D)."""
        # cosines in half precision are too coarse for τ = 0.02
        with torch.autocast(multi_vectors.device.type, enabled=False):
            losses = {"contrastive": self._contrastive_loss(multi_vectors, batch)}
            if multi_vectors.shape[1] > 1 and torch.is_grad_enabled():
                self._cosines.append(token_cosines(multi_vectors.detach()).abs().mean())
            if self.w_orth:
                of_samples = multi_vectors[batch.inputs.T.flatten().to(multi_vectors.device)]
                losses["orthogonality"] = self.w_orth * orthogonality(of_samples)
        return losses

    def _contrastive_loss(self, multi_vectors: Tensor, batch: Batch) -> Tensor:
        pairs = Contrast.of(multi_vectors, batch, self.symmetric, self.mask_duplicates)
        tau: float | Tensor = self.temperature
        if self.log_temperature is not None:
            tau = self.log_temperature.exp()
        elif batch.temperatures is not None:
            tau = batch.temperatures[:, None].to(multi_vectors)
        losses = []
        for width in (*self.matryoshka, multi_vectors.shape[2]):
            queries, documents = pairs.queries[:, :width], pairs.documents[:, :width]
            loss = self._info_nce(queries, documents, tau, pairs.rows, pairs.masked)
            if pairs.all_queries is not None:
                positives, queries = pairs.positives[:, :width], pairs.all_queries[:, :width]
                reverse = self._info_nce(positives, queries, tau, pairs.rows, pairs.masked_queries)
                loss = (loss + reverse) / 2
            losses.append(loss)
        return torch.stack(losses).mean()

    def _info_nce(
        self,
        queries: Tensor,
        documents: Tensor,
        temperature: float | Tensor,
        positives: Tensor,
        masked: Tensor | None,
    ) -> Tensor:
        """:func:`~rematch.losses.info_nce` with at most ``max_scores`` scores in memory."""
        size = max(1, self.max_scores // len(documents))
        if size >= len(queries):
            return info_nce(
                queries,
                documents,
                temperature,
                positives=positives,
                masked=masked,
                hardness=self.hardness,
            )
        total = queries.new_zeros(())
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            tau = temperature
            if isinstance(temperature, Tensor) and temperature.ndim:
                tau = temperature[rows]
            loss = partial(
                info_nce,
                positives=positives[rows],
                masked=None if masked is None else masked[rows],
                hardness=self.hardness,
            )
            chunk = queries[rows]
            total = total + len(chunk) * checkpoint(
                loss, chunk, documents, tau, use_reentrant=False
            )
        return total / len(queries)

    def answers(self, logits: Tensor, relevant: Tensor, batch: Batch) -> Tensor:
        """A mini-batch's share of ``w_qdm`` · L_qdm; see :meth:`MiniBatchedLoss.answers`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        yes, no = self.backbone.answer_ids
        slots = relevant.repeat(1, len(self.views))  # (b, A)
        if torch.is_grad_enabled():  # neither in the cache's first pass nor in validation
            correct = (logits[..., yes] > logits[..., no]) == slots
            by_view = correct.detach().view(-1, len(self.views), 2)
            positive_first = (~relevant).int().argsort(dim=1, stable=True)[:, None]
            self._correct.append(by_view.gather(2, positive_first.expand_as(by_view)))
        share = len(logits) / len(batch.inputs)
        return self.w_qdm * share * matching_loss(logits, slots, yes, no)

    def pop_metrics(self) -> dict[str, float]:
        """Metrics since the last call.

        Returns:
            The accuracy of Yes and No in percent for each view, with d+ and with d-; and the mean
            absolute cosine between the token vectors of an input.
        """
        metrics = {}
        if self._cosines:
            metrics["token_cosine"] = round(torch.stack(self._cosines).mean().item(), 4)
            self._cosines.clear()
        if self._correct:
            accuracy = torch.cat(self._correct).float().mean(0).tolist()
            self._correct.clear()
            for view, by_document in zip(self.views, accuracy, strict=True):
                for document, share in zip(("positive", "negative"), by_document, strict=True):
                    metrics[f"match_accuracy/{view}/{document}"] = round(100 * share, 2)
        return metrics
