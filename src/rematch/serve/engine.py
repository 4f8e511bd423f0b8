"""The model, and an index if there is one, behind the HTTP API.

Methods that compute belong to the model's thread (:mod:`rematch.serve.batching`). Measuring inputs
and looking up documents belong to any other.
"""

import io
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rematch.data.images import data_url, load_image
from rematch.encoding.encoder import Encoder
from rematch.errors import ImageError, RematchError
from rematch.interpretability import attention_maps, overlay
from rematch.model import ReMatch
from rematch.scoring import probability
from rematch.search.index import Hit, Hits, Index
from rematch.search.storage import exists
from rematch.serve.inputs import Input
from rematch.serve.limits import ClientError

_EXAMPLES = 4  # texts that the page offers as queries
_OVERLAYS = 6  # token vectors whose attention the page shows
_OVERLAY_EDGE = 320  # pixels


class Engine:
    """What is served.

    Args:
        target: An index, or a model: a checkpoint directory, a hub name, or rematch-tiny.
        model: Where the model of the index lies now, if it was moved.

    Raises:
        RematchError: If ``target`` is neither.
    """

    def __init__(self, target: str, model: str | None = None) -> None:
        self.index: Index | None = None
        if "://" in target or (Path(target).is_dir() and exists(target)):
            self.index = Index.open(target, model)
            self.model = self.index.model
            self.name = self.index.settings.model
        else:
            self.model, self.name = ReMatch(model or target), model or target
        self.name = Path(self.name).name or self.name
        self._measuring_encoder = Encoder(_with_own_processor(self.model), workers=0)
        self._measuring = Lock()  # a tokenizer must not be used by two threads at once

    def measure(self, inputs: Sequence[Input]) -> list[int]:
        """Number of tokens of each input, pictures included; for any thread.

        Raises:
            RematchError: If an input is longer than the model takes.
        """
        with self._measuring:
            lengths = self._measuring_encoder.lengths(inputs)
        limit = self.model.max_seq_length
        for length in lengths:
            if limit and length > limit:
                raise RematchError(
                    f"an input of {length:,} tokens; the model takes {limit:,}. Shorten it."
                )
        return lengths

    # ---- in the model's thread ------------------------------------------------------------------

    def embed_queries(self, queries: Sequence[Input]) -> list[NDArray[np.float32]]:
        """The embedding of each query, (D,)."""
        return self._embed(self.model.encode_query, queries)

    def embed_documents(self, documents: Sequence[Input]) -> list[NDArray[np.float32]]:
        """The embedding of each document, (D,)."""
        return self._embed(self.model.encode_document, documents)

    def _embed(
        self, encode: Callable[..., Any], inputs: Sequence[Input]
    ) -> list[NDArray[np.float32]]:
        return list(encode(inputs, batch_size=len(inputs), show_progress_bar=False))

    def match(
        self, requests: Sequence[tuple[Input, Sequence[Input]]]
    ) -> list[NDArray[np.float64]]:
        """P(yes) of the N documents of each (query, documents), (N,)."""
        queries = [query for query, _ in requests]
        document_lists = [documents for _, documents in requests]
        return [probability(m) for m in self.model.score_lists(queries, document_lists)]

    def search(
        self, queries: Sequence[Input], *, top: int, filter: str, rerank: str
    ) -> list[Hits]:
        """The hits of each query; options as for
        :meth:`~rematch.search.index.Index.search`.
        """
        assert self.index is not None
        return self.index.search(list(queries), top, filter=filter, rerank=rerank)

    def attention_maps(
        self, inputs: Sequence[Input], *, task: Literal["query", "document"]
    ) -> list[NDArray[np.float32]]:
        """The attention of the K learnable tokens to the picture of each input, (K, h, w)."""
        return [attention_maps(self.model, value, task) for value in inputs]

    # ---- documents of the index, in any thread --------------------------------------------------

    def document(self, document_id: str) -> Input:
        """A document of the index as the model reads it, its picture decoded.

        Raises:
            ClientError: 404 if the index does not hold it.
            ImageError: If its picture cannot be read.
        """
        assert self.index is not None
        documents = self.index.documents([document_id])
        if not documents:
            raise ClientError("the index has no document with this id.", 404)
        parts: Any = documents[0].item().as_input(self.index.settings.document_instructions)
        if "image" in parts:
            parts["image"] = load_image(parts["image"])
        document: Input = parts
        return document

    def picture(self, document_id: str, edge: int) -> bytes:
        """A document's picture as JPEG, its longer side at most ``edge`` pixels.

        Raises:
            ClientError: 404 if the document has no picture or its file cannot be read.
        """
        try:
            picture = self.document(document_id).get("image")
        except ImageError:
            picture = None
        if picture is None:
            raise ClientError("the document has no picture, or its file is gone.", 404)
        assert isinstance(picture, Image.Image)
        buffer = io.BytesIO()
        picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def ids_with_picture(self, hits: Sequence[Hit]) -> set[str]:
        """The ids of the hits that have a picture; no picture is read."""
        assert self.index is not None
        with_file = {hit.id for hit in hits if hit.path}
        others = [hit.id for hit in hits if not hit.path]
        return with_file | self.index.with_stored_picture(others)

    def examples(self) -> list[str]:
        """A few short texts of the index, always the same ones."""
        assert self.index is not None
        rows = self.index.table.search().where("text != ''").select(["text"]).limit(200).to_list()
        texts = sorted({" ".join(row["text"].split()) for row in rows if len(row["text"]) < 80})
        return random.Random(0).sample(texts, min(_EXAMPLES, len(texts)))

    def overlays(
        self, pictures: Image.Image | list[Image.Image], maps: NDArray[np.float32]
    ) -> list[str]:
        """Pictures that show attention, as data URLs.

        Args:
            pictures: An input's picture or pictures; the first one is shown.
            maps: As from :meth:`attention_maps`.

        Returns:
            The mean over all tokens, then each of the first tokens.
        """
        picture = pictures[0] if isinstance(pictures, list) else pictures
        selected = [maps.mean(0), *maps[:_OVERLAYS]]
        return [data_url(overlay(picture, weights), _OVERLAY_EDGE) for weights in selected]


def _with_own_processor(model: ReMatch) -> ReMatch:
    """A copy that shares the weights, but has a processor and a tokenizer for another thread."""
    weights = [*model.backbone.model.modules(), *model.fusion.modules()]
    return deepcopy(model, {id(module): module for module in weights})
