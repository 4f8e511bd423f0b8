"""The model, and an index if there is one, behind the HTTP API: what runs in the model's thread."""

import io
import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rematch.data.images import data_url, load_image
from rematch.encoding.encoder import Encoder
from rematch.errors import ImageError, RematchError
from rematch.interpretability import attention_maps, overlay
from rematch.model import ReMatch
from rematch.scoring import probability
from rematch.search.index import Hit, Index
from rematch.search.storage import exists
from rematch.serve.limits import ClientError


class Engine:
    """What is served.

    Args:
        target: An index, or a model: a checkpoint directory, a hub name, or rematch-tiny.
        model: For an index whose model has moved: where it lies now.

    Raises:
        RematchError: If it is neither.
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
        self.encoder = Encoder(self.model, workers=0)
        self._tokenizer, self._measuring = deepcopy(self.model.tokenizer), Lock()

    def text_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens texts become; by a tokenizer of its own, as the model's belongs to the
        model's thread.

        Raises:
            RematchError: If one is longer than the model takes.
        """
        with self._measuring:
            counts = [
                len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            ]
        return [self._fitting(count) for count in counts]

    def _fitting(self, count: int) -> int:
        limit = self.model.max_seq_length
        if limit and count > limit:
            raise RematchError(
                f"an input of {count:,} tokens; the model takes {limit:,}. Shorten it."
            )
        return count

    def run(self, kind: tuple[Any, ...], values: list[Any]) -> Sequence[Any]:
        """Results of calls of one kind, one each.

        Args:
            kind: ``("measure",)`` with inputs → tokens; ``("query",)``, ``("document",)`` →
                vectors (D,); ``("match",)`` with (query, documents) → (N,); ``("search", top,
                filter, rerank)`` with queries → hits; ``("attention", task)`` with inputs that
                have a picture → (K, h, w).
        """
        what, *options = kind
        if what == "measure":
            measured = self.encoder.measure(values, "document")
            return [self._fitting(m.tokens) for m in measured]
        if what == "query":
            return list(self._vectors(self.model.encode_query, values))
        if what == "document":
            return list(self._vectors(self.model.encode_document, values))
        if what == "match":
            queries, document_lists = zip(*values, strict=True)
            return [probability(m) for m in self.model.score_lists(queries, document_lists)]
        if what == "attention":
            return [attention_maps(self.model, value, *options) for value in values]
        assert self.index is not None
        top, condition, rerank = options
        return self.index.search(values, top, filter=condition, rerank=rerank)

    def _vectors(self, encode: Any, values: list[Any]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = encode(
            values, batch_size=len(values), show_progress_bar=False
        )
        return vectors

    # ---- documents of the index, outside the model's thread -------------------------------------

    def document(self, name: str) -> dict[str, Any]:
        """A document of the index as the model reads it, its picture decoded.

        Raises:
            ClientError: 404 if it is not there.
        """
        assert self.index is not None
        found = self.index.documents([name])
        if not found:
            raise ClientError("the index holds no document of that id.", 404)
        given = found[0].item().as_input(self.index.settings.document_instructions)
        return given | ({"image": load_image(given["image"])} if "image" in given else {})  # type: ignore[arg-type]

    def picture(self, name: str, edge: int) -> bytes:
        """A document's picture as JPEG.

        Raises:
            ClientError: 404 if there is none, or its file is gone.
        """
        try:
            picture = self.document(name).get("image")
        except ImageError:
            picture = None
        if picture is None:
            raise ClientError("the document has no picture, or its file is gone.", 404)
        buffer = io.BytesIO()
        picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def with_pictures(self, hits: list[Hit]) -> set[str]:
        """The ids of those that have a picture; none is read."""
        assert self.index is not None
        known = {hit.id for hit in hits if hit.path}
        return known | self.index.with_stored_picture(
            [hit.id for hit in hits if hit.id not in known]
        )

    def examples(self) -> list[str]:
        """A few texts of the index."""
        assert self.index is not None
        rows = self.index.table.search().where("text != ''").select(["text"]).limit(200).to_list()
        texts = sorted({" ".join(row["text"].split()) for row in rows if len(row["text"]) < 80})
        return random.Random(0).sample(texts, min(4, len(texts)))

    def shown(self, pictures: Any, maps: NDArray[np.float32]) -> list[str]:
        """Overlays as data URLs: of all tokens, and of the first six."""
        picture = pictures[0] if isinstance(pictures, list) else pictures
        return [data_url(overlay(picture, m), 320) for m in (maps.mean(0), *maps[:6])]
