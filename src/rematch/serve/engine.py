"""The model, and an index if there is one, behind the HTTP API.

Methods that compute belong to the model's thread (:mod:`rematch.serve.batching`). Measuring inputs
and looking up documents belong to any other.
"""

import io
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rematch.data.clips import Clip
from rematch.data.document import Document, Value
from rematch.data.images import EncodedPicture, data_url, load_image
from rematch.data.instructions import with_instruction
from rematch.data.pages import PdfPage
from rematch.encoding.encoder import Encoder
from rematch.errors import ImageError, RematchError
from rematch.interpretability import attention_maps, overlay
from rematch.matching import View
from rematch.model import ReMatch
from rematch.scoring import probability
from rematch.search.cascade import Stage, parse_stages
from rematch.search.hits import Hit, Hits
from rematch.search.index import Index, UnknownDocumentError
from rematch.search.retrieval import Mode
from rematch.search.storage import UnreadableIndexError, exists
from rematch.serve.batching import check_wanted
from rematch.serve.inputs import Input
from rematch.serve.limits import ClientError

_EXAMPLES = 4  # texts that the page offers as queries
_OVERLAYS = 6  # token vectors whose attention the page shows
_OVERLAY_EDGE = 320  # pixels
_QUERIES = 16  # that are searched for before the next check whether somebody waits
_PAGE_SIZE, _FRAME_SIZE = (842, 1191), (640, 360)  # pixels
_SAMPLE, _MEAN_SECONDS = 16, 60.0  # documents that are measured, and how long that holds


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
        self.model.backbone.base.register_forward_pre_hook(lambda *_: check_wanted())
        self._measuring_encoder = Encoder(_with_own_processor(self.model), workers=0)
        self._measuring = Lock()  # a tokenizer must not be used by two threads at once
        self._query_overhead, self._document_overhead = self.model.backbone.questions.overhead()
        self._mean_tokens = (0, -math.inf)  # of a document, and when it was measured
        self.seconds_per_token = self._time_a_pass()

    def check_filter(self, filter: str) -> None:
        """Check a condition on the index, for any thread.

        Raises:
            DataError: If it is not one.
        """
        assert self.index is not None
        with _index_errors():
            self.index.condition(filter)

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

    def _time_a_pass(self) -> float:
        """Seconds per token of a forward pass, and everything is loaded for the first request."""
        limit = self.model.max_seq_length or 400
        document: Input = {"text": "word " * min(100, limit // 4)}
        self.embed_documents([document])
        started = time.monotonic()
        self.embed_documents([document])
        return (time.monotonic() - started) / self.measure([document])[0]

    # ---- the cost of a request, in any thread ---------------------------------------------------

    def stages(self, rerank: str, most: int) -> tuple[Stage, ...]:
        """The stages of a search.

        Args:
            rerank: As for :meth:`~rematch.search.index.Index.search`.
            most: How many documents a stage may rerank.

        Raises:
            RematchError: If it cannot be parsed, or a stage reranks more documents.
        """
        assert self.index is not None
        stages = parse_stages(rerank, self.index.settings, self.model.backbone.width)
        for stage in stages:
            if stage.count > most:
                raise ClientError(
                    f"rerank {rerank}: {stage.count} documents in a stage; this server reranks at "
                    f"most {most} (--most-rerank)."
                )
        return tuple(stages)

    def match_tokens(self, query: int, documents: Sequence[int]) -> int:
        """How many tokens the matching head reads, from the lengths of query and documents."""
        pairs = sum(documents) + len(documents) * self._document_overhead
        return self._query_overhead + query + pairs

    def search_tokens(self, query: int, stages: Sequence[Stage]) -> int:
        """About how many tokens a search reads.

        Args:
            query: Length of the query.
            stages: The stages, whose documents count as the mean of a sample.
        """
        tokens = query
        for stage in stages:
            count = min(stage.count, self.document_count())
            if isinstance(stage.by, View):
                length = self._mean_document_tokens() if stage.by.document == "raw" else 1
                tokens += self.match_tokens(
                    query if stage.by.query == "raw" else 1, [length] * count
                )
            else:  # MaxSim embeds the query again
                tokens += query + count
        return tokens

    def mode(self, query: Input, mode: Mode) -> Mode:
        """What the first stage of a search compares, as :meth:`~rematch.search.index.Index.mode`.

        Raises:
            DataError: If the query or the documents have no words to compare.
        """
        assert self.index is not None
        with _index_errors():
            return self.index.mode(query, mode)

    def instruct(self, query: Input, instruction: str | None) -> tuple[Input, str]:
        """A query with an instruction, by default that of the index, and the instruction."""
        assert self.index is not None
        with _index_errors():
            text = self.index.instruction(query) if instruction is None else instruction
        return with_instruction(query, text), text

    def _mean_document_tokens(self) -> int:
        """Mean length of a document of the index, measured once a minute."""
        mean, measured = self._mean_tokens
        if time.monotonic() - measured > _MEAN_SECONDS:
            with _index_errors():
                assert self.index is not None
                documents = self.index.sample(_SAMPLE)
            with self._measuring, ExitStack() as files:
                inputs = [_as_header(document, files) for document in documents]
                lengths = self._measuring_encoder.lengths(inputs)
            mean = max(1, round(sum(lengths) / max(1, len(lengths))))
            self._mean_tokens = mean, time.monotonic()
        return mean

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

    def search(self, queries: Sequence[Input], **settings: Any) -> list[Hits]:
        """The hits of each query; settings as for :meth:`~rematch.search.index.Index.search`."""
        assert self.index is not None
        hits: list[Hits] = []
        with _index_errors():
            # a pass, and scans, which take time too
            for start in range(0, len(queries), _QUERIES):
                chunk = list(queries[start : start + _QUERIES])
                hits += self.index.search(chunk, **settings)
        return hits

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
        with _index_errors():
            documents = self.index.documents([document_id])
        if not documents:
            raise ClientError("the index has no document with this id.", 404)
        parts: Any = documents[0].item().as_input(self.index.settings.document_instructions)
        pictures = parts.get("image")
        if isinstance(pictures, list):
            parts["image"] = list(map(load_image, pictures))
        elif pictures is not None:
            parts["image"] = load_image(pictures)
        document: Input = parts
        return document

    def picture(self, document_id: str, edge: int) -> bytes:
        """A document's picture as JPEG, its longer side at most ``edge`` pixels.

        Raises:
            ClientError: 404 if the document has no picture or its file cannot be read.
        """
        try:
            pictures = self.document(document_id).get("image")
        except ImageError:
            pictures = None
        if pictures is None:
            raise ClientError("the document has no picture, or its file is gone.", 404)
        # the poster of a video is a frame from its middle
        picture = pictures[len(pictures) // 2] if isinstance(pictures, list) else pictures
        buffer = io.BytesIO()
        picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def ids_with_picture(self, hits: Sequence[Hit]) -> set[str]:
        """The ids of the hits that have a picture.

        Stored pictures are read only for hits with a text; without one, a hit is a picture.
        """
        assert self.index is not None
        pictures = {hit.id for hit in hits if hit.path or not hit.text}
        others = [hit.id for hit in hits if hit.id not in pictures]
        with _index_errors():
            return pictures | self.index.with_stored_picture(others)

    def similar(self, document_id: str, top: int, filter: str) -> Hits:
        """The documents nearest to a document of the index.

        Raises:
            ClientError: 404 if the index does not hold it.
        """
        assert self.index is not None
        with _index_errors():
            try:
                return self.index.similar(document_id, top, filter=filter)
            except UnknownDocumentError:
                raise ClientError("the index has no document with this id.", 404) from None

    def facets(self) -> dict[str, list[Value]]:
        """Columns of the metadata with few values."""
        assert self.index is not None
        with _index_errors():
            return self.index.facets()

    def file(self, document_id: str) -> Path:
        """The PDF file or the video that a document is from.

        Raises:
            ClientError: 404 if there is none.
        """
        assert self.index is not None
        with _index_errors():
            path = self.index.path(document_id)
        source = PdfPage.parse(path) or Clip.parse(path)
        if source is None or not source.path.is_file():
            raise ClientError("no PDF file or video of this document is there.", 404)
        return source.path

    def examples(self) -> list[str]:
        """A few short texts of the index, always the same ones."""
        assert self.index is not None
        with _index_errors():
            first_texts = self.index.texts(200)
        texts = sorted({" ".join(text.split()) for text in first_texts if len(text) < 80})
        return random.Random(0).sample(texts, min(_EXAMPLES, len(texts)))

    def document_count(self) -> int:
        """How many documents the index has; none without an index."""
        with _index_errors():
            return 0 if self.index is None else len(self.index)

    def probe(self) -> None:
        """Read a row of the index, if there is one.

        Raises:
            ClientError: 503 if it cannot be read.
        """
        with _index_errors():
            if self.index is not None:
                self.index.probe()

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


@contextmanager
def _index_errors() -> Iterator[None]:
    """An index that cannot be read is no fault of the client's, who need not know its path."""
    try:
        yield
    except UnreadableIndexError:
        raise ClientError("the index cannot be read at present. Try again.", 503) from None


def _as_header(document: Document, files: ExitStack) -> dict[str, Any]:
    """A document whose picture is opened but not decoded; without it if that is impossible.

    Pages and frames of videos are not rendered; they count with usual sizes.
    """
    value: dict[str, Any] = {"text": document.item().text}
    source: Path | io.BytesIO | None = None
    if isinstance(document.image, EncodedPicture):
        source = io.BytesIO(document.image.content)
    elif isinstance(document.image, PdfPage):
        value["image"] = Image.new("RGB", _PAGE_SIZE)
    elif isinstance(document.image, Clip):
        value["image"] = [Image.new("RGB", _FRAME_SIZE)] * document.image.frames
    elif document.image is not None and document.image.is_file():
        source = document.image
    if source is not None:
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            value["image"] = files.enter_context(Image.open(source))
    return value


def _with_own_processor(model: ReMatch) -> ReMatch:
    """A copy that shares the weights, but has a processor and a tokenizer for another thread."""
    weights = [*model.backbone.model.modules(), *model.fusion.modules()]
    return deepcopy(model, {id(module): module for module in weights})
