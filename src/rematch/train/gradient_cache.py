"""A step in mini-batches: plain or with a gradient cache, in one process or in several.

With the gradient cache, memory holds the activations of one mini-batch at a time
(https://arxiv.org/abs/2101.06983):

1. embed every mini-batch without a graph, keeping the state of the random generators;
2. compute all losses from the embeddings, and the gradient of the embeddings;
3. in the backward pass, answer the questions again, with a graph, which adds to the gradient of
   the embeddings (questions show them as ``Z*``); then embed every mini-batch again, with a graph,
   and propagate the gradient of its embeddings.

Shapes: B samples, N distinct inputs, M documents of all processes, K learnable tokens, D width,
A answer slots, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rematch.backbone.module import Backbone
from rematch.backbone.pictures import PictureFeatures, Pictures
from rematch.model import ReMatch
from rematch.tokens import fuse
from rematch.train.batch import Batch, MiniBatch
from rematch.train.parallel import accumulating, aligned, first_row, gather, largest, touch


@dataclass
class Passes:
    """The forward passes of a batch in this process, as many as in every other process.

    Attributes:
        batch: The batch.
        embedding: Mini-batches to embed, with weight 1; or 0 if they only keep other processes
            company.
        matching: Mini-batches of questions, weighted likewise.
        features: What a frozen vision tower computed for the distinct pictures; ``None`` if every
            pass runs the tower.
        random_states: State of the random generators before each pass, for its repetition.
    """

    batch: Batch
    embedding: list[tuple[MiniBatch, float]]
    matching: list[tuple[MiniBatch, float]]
    features: list[PictureFeatures] | None
    random_states: list[RandContext] = field(default_factory=list)


@dataclass
class Contrast:
    """What the contrastive loss compares, over all processes.

    Attributes:
        queries: E* of this process's queries, (B, D).
        positives: E* of their positives, (B, D).
        documents: E* of the documents of all processes, positives first, (M, D).
        all_queries: E* of the queries of all processes; ``None`` unless the loss is symmetric.
        rows: Row of each query's positive among the documents, and of each positive's query among
            all queries, (B,).
        masked: True for documents that are not negatives of a query, (B, M); ``None`` for none.
        masked_queries: True for queries that are not negatives of a positive; ``None`` for none.
    """

    queries: Tensor
    positives: Tensor
    documents: Tensor
    all_queries: Tensor | None
    rows: Tensor
    masked: Tensor | None = None
    masked_queries: Tensor | None = None

    @classmethod
    def of(
        cls, multi_vectors: Tensor, batch: Batch, symmetric: bool, mask_duplicates: bool
    ) -> "Contrast":
        """From the multi-vectors of this process's distinct inputs, (N, K, D)."""
        inputs = batch.inputs.to(multi_vectors.device)
        embeddings = fuse(multi_vectors)
        queries, positives = embeddings[inputs[:, 0]], embeddings[inputs[:, 1]]
        documents = torch.cat([gather(embeddings[column]) for column in inputs.T[1:]])
        all_queries = gather(queries) if symmetric else None
        rows = first_row(len(queries)) + torch.arange(len(queries), device=inputs.device)
        contrast = cls(queries, positives, documents, all_queries, rows)
        if mask_duplicates:
            keys = batch.keys.to(multi_vectors.device)
            query_keys, positive_keys = keys[inputs[:, 0]], keys[inputs[:, 1]]
            document_keys = torch.cat([gather(keys[column]) for column in inputs.T[1:]])
            contrast.masked = positive_keys[:, None] == document_keys
            same_positive = positive_keys[:, None] == gather(positive_keys)
            same_query = query_keys[:, None] == gather(query_keys)
            contrast.masked_queries = same_positive | same_query
        return contrast


class MiniBatchedLoss(nn.Module, ABC):
    """Computes a loss in mini-batches; a subclass says what the loss is.

    Args:
        model: The model in training.
        gradient_cache: Bound the memory by the mini-batch instead of the batch, for one more
            forward pass.
        features_gb: GiB of features of a frozen vision tower that are kept during a step; if they
            take more, the tower runs again in every forward pass.
    """

    def __init__(self, model: ReMatch, gradient_cache: bool, features_gb: float) -> None:
        super().__init__()
        self.model = model
        self.gradient_cache = gradient_cache
        self.features_gb = features_gb

    @abstractmethod
    def contrast(self, multi_vectors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses of the multi-vectors of the distinct inputs, (N, K, D), by name."""

    @abstractmethod
    def answers(self, logits: Tensor, relevant: Tensor, batch: Batch) -> Tensor:
        """A mini-batch's share of the matching loss.

        Args:
            logits: Logits at the answer slots, (b, A, V); for every view both documents.
            relevant: Whether each document is the positive, (b, 2).
            batch: The batch.
        """

    def own_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the loss itself."""
        return list(self.parameters(recurse=False))

    def forward(self, features: Sequence[Any], labels: Tensor | None = None) -> dict[str, Tensor]:
        passes = self.passes(features[0])
        if self.gradient_cache and torch.is_grad_enabled():
            return self._forward_cached(passes)
        embedded = [(self.embed(mb, passes), weight) for mb, weight in passes.embedding]
        multi_vectors = torch.cat([vectors for (vectors, _), weight in embedded if weight])
        losses = self.contrast(multi_vectors, passes.batch)
        idle = [vectors.sum() * 0.0 for (vectors, _), weight in embedded if not weight]
        losses["contrastive"] = losses["contrastive"] + sum(idle, start=touch(self.model))
        shares = [share * weight for (_, share), weight in embedded if share is not None]
        embeddings = fuse(multi_vectors)
        shares += [self.match(mb, passes, embeddings) * w for mb, w in passes.matching]
        if shares:
            losses["matching"] = torch.stack(shares).sum()
        return losses

    # ---- forward passes -------------------------------------------------------------------------

    def passes(self, batch: Batch) -> Passes:
        """The forward passes of a batch, agreed with the other processes."""
        counts = [len(batch.embedding), len(batch.matching)]
        embedding, matching = largest(counts, self.backbone.model.device)
        return Passes(
            batch,
            aligned(batch.embedding, embedding),
            aligned(batch.matching, matching),
            self.picture_features(batch),
        )

    def picture_features(self, batch: Batch) -> list[PictureFeatures] | None:
        """What a frozen vision tower computes for the distinct pictures of a batch, once.

        Returns:
            ``None`` if the tower trains, or if the features take more than ``features_gb`` in any
            process; every pass then runs the tower on its own pictures.
        """
        backbone = self.backbone
        if backbone.trains_vision:
            return None
        pictures, chunks, size = batch.pictures, list[range](), 0
        if pictures:
            chunks = pictures.chunks(batch.batch_tokens)
            size = backbone.feature_bytes(sum(pictures.tokens))
        too_large = size > self.features_gb * 2**30
        count, too_large_anywhere = largest([len(chunks), int(too_large)], backbone.model.device)
        if too_large_anywhere:
            return None
        features: list[PictureFeatures] = []
        idle = self.blank_picture if count > len(chunks) else None
        with torch.no_grad():
            parts = [pictures.take(chunk) for chunk in chunks] if pictures else []
            for part, weight in aligned(parts, count, idle):
                chunk_features = self.model(part, method="picture_features")
                features += chunk_features if weight else []
        return features

    def embed(self, mini_batch: MiniBatch, passes: Passes) -> tuple[Tensor, Tensor | None]:
        """Embed a mini-batch.

        Returns:
            Multi-vectors, (n, K, D); and in ``reuse`` mode its share of the matching loss.
        """
        inputs = self._inputs(mini_batch, passes)
        if not mini_batch.parts:
            return self.model(inputs)["multi_vector"], None
        relevant = inputs.pop("relevant")
        multi_vectors, logits = self.model(inputs, method="embed_and_answer")
        return multi_vectors, self.answers(logits, relevant, passes.batch)

    def match(self, mini_batch: MiniBatch, passes: Passes, embeddings: Tensor) -> Tensor:
        """A mini-batch's share of the matching loss.

        Args:
            mini_batch: A mini-batch of questions.
            passes: The passes of its batch.
            embeddings: E* of all distinct inputs, (N, D).
        """
        inputs = self._inputs(mini_batch, passes)
        relevant, numbers = inputs.pop("relevant"), inputs.pop("placeholder_inputs")
        inputs["embeddings"] = embeddings[numbers] if len(numbers) else None
        return self.answers(self.model(inputs, method="answer"), relevant, passes.batch)

    def _inputs(self, mini_batch: MiniBatch, passes: Passes) -> dict[str, Any]:
        """Inputs of the model on its device, with pictures or their features."""
        device = self.backbone.model.device
        inputs: dict[str, Any] = {n: v.to(device) for n, v in mini_batch.tensors.items()}
        if mini_batch.parts:
            tensors = [part.tensors for part in mini_batch.parts]
            inputs["parts"] = [{n: v.to(device) for n, v in part.items()} for part in tensors]
            inputs["picture_sets"] = [len(part.picture_sets) for part in mini_batch.parts]
        parts = mini_batch.parts or [mini_batch]
        numbers = [number for part in parts for number in part.picture_sets]
        if passes.features is not None:
            inputs["picture_features"] = [passes.features[number] for number in numbers]
        elif numbers and passes.batch.pictures is not None:
            distinct = list(dict.fromkeys(numbers))
            inputs["pictures"] = passes.batch.pictures.take(distinct)
            inputs["picture_order"] = [distinct.index(number) for number in numbers]
        elif isinstance(self.model, FSDPModule):
            inputs["idle_pictures"] = self.blank_picture
        return inputs

    @property
    def backbone(self) -> Backbone:
        """Backbone of the model, which a trainer may have wrapped."""
        model: Any = getattr(self.model, "module", self.model)
        backbone: Backbone = model.backbone
        return backbone

    @cached_property
    def blank_picture(self) -> Pictures:
        """Lets a process without pictures join the others in running the vision tower.

        The weights of a sharded tower are gathered by all processes together.
        """
        reading = self.backbone.reader.read(Image.new("RGB", (64, 64), "white"))
        return Pictures.collect([reading.vision], [reading.visual_tokens])

    # ---- gradient cache -------------------------------------------------------------------------

    def _forward_cached(self, passes: Passes) -> dict[str, Tensor]:
        device = torch.empty(0, device=self.backbone.model.device)
        parts: list[Tensor] = []
        shares: list[Tensor] = []
        with torch.no_grad():
            for mini_batch, weight in passes.embedding:
                passes.random_states.append(RandContext(device))
                vectors, share = self.embed(mini_batch, passes)
                parts += [vectors] if weight else []
                shares += [share] if weight and share is not None else []
        multi_vectors = torch.cat(parts).requires_grad_()
        losses = self.contrast(multi_vectors, passes.batch)
        parameters = self.own_parameters()
        total = torch.stack(list(losses.values())).sum()
        gradient, *own_gradients = torch.autograd.grad(total, [multi_vectors, *parameters])
        embeddings = fuse(multi_vectors.detach())
        with torch.no_grad():
            for mini_batch, weight in passes.matching:
                passes.random_states.append(RandContext(device))
                shares.append(self.match(mini_batch, passes, embeddings) * weight)
        if shares:
            losses["matching"] = torch.stack(shares).sum()
        losses = {name: value.detach() for name, value in losses.items()}
        # the trainer adds up the losses, so whatever it scales the sum by arrives at this one
        carrier = losses["contrastive"].requires_grad_()
        backward = partial(
            self._backward_cached,
            passes=passes,
            embeddings=embeddings,
            gradient=gradient,
            autocast=_autocast_of(device.device.type),
        )
        carrier.register_hook(backward)  # type: ignore[no-untyped-call]
        for parameter, own_gradient in zip(parameters, own_gradients, strict=True):
            zero = parameter - parameter.detach()
            losses["contrastive"] = losses["contrastive"] + own_gradient * zero
        return losses

    @torch.enable_grad()
    def _backward_cached(
        self,
        scale: Tensor,
        *,
        passes: Passes,
        embeddings: Tensor,
        gradient: Tensor,
        autocast: AbstractContextManager[Any],
    ) -> None:
        """Step 3 of the module docstring.

        Args:
            scale: Gradient that the loss receives (fp16 loss scale, gradient accumulation).
            passes: The passes to repeat.
            embeddings: E* of all distinct inputs, (N, D).
            gradient: Gradient of the multi-vectors, (N, K, D), before scaling.
            autocast: The precision of the first pass.
        """
        count = len(passes.embedding)
        embedding_states, matching_states = (
            passes.random_states[:count],
            passes.random_states[count:],
        )
        leaf = embeddings.clone().requires_grad_()
        for (mini_batch, weight), state in zip(passes.matching, matching_states, strict=True):
            with state, accumulating(self.model):
                with autocast:
                    share = self.match(mini_batch, passes, leaf)
                torch.autograd.backward(share * (scale * weight))
        gradient = gradient * scale
        if leaf.grad is not None:  # it is None if no question shows an embedding
            gradient = gradient + leaf.grad[:, None] / gradient.shape[1]  # E* is the mean of K
        parts = list(torch.split(gradient, [mb.size for mb in passes.batch.embedding]))
        parts += [torch.zeros_like(parts[-1])] * (count - len(parts))
        for i, (mini_batch, weight) in enumerate(passes.embedding):
            last = i == count - 1
            with embedding_states[i], accumulating(self.model, last):
                with autocast:
                    vectors, mini_batch_share = self.embed(mini_batch, passes)
                surrogate = (vectors * parts[i]).sum()
                if last:
                    surrogate = surrogate + touch(self.model)
                if mini_batch_share is not None:
                    surrogate = surrogate + mini_batch_share * (scale * weight)
                torch.autograd.backward(surrogate)


def _autocast_of(device_type: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for a later pass: the backward pass may run in another thread,
    and the forward method of a sharded model has no autocast of its own.
    """
    available = torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type))
