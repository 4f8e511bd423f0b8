"""The HTTP API: OpenAI's embeddings, Jina's and Cohere's rerank, search.

:func:`create_app` makes the application around an :class:`~rematch.serve.engine.Engine`. Requests
are checked and pictures decoded in a pool of threads, the model computes in a thread of its own
(:mod:`rematch.serve.batching`); the event loop does neither.
"""

import asyncio
import base64
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException

from rematch import __version__
from rematch.scoring import truncate
from rematch.serve.answers import answer_errors, refusal
from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError, Limits, picture_from
from rematch.serve.page import add_page
from rematch.serve.schemas import (
    AttentionRequest,
    AttentionResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    ImagePart,
    Message,
    ModelCard,
    ModelList,
    Multimodal,
    RerankRequest,
    RerankResponse,
    RerankResult,
    SearchHit,
    SearchRequest,
    SearchResponse,
    Usage,
)

T = TypeVar("T")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    ),
)
_REFUSALS = (400, 401, 404, 413, 422, 429, 503, 504)
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in _REFUSALS
}
_TASKS = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "search_document": "document",
}
_TASKS |= {"passage": "document"}


def create_app(
    engine: Engine,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    *,
    budget: int = 4096,
    most_waiting: int = 512,
    timeout: float = 60.0,
    together: bool = True,
) -> FastAPI:
    """The application.

    Args:
        engine: What is served.
        limits: Of a request.
        keys: One of them must come as ``Authorization: Bearer …``; none: anybody may ask.
        budget: Tokens of a batch.
        most_waiting: Calls in the queue; more are refused with 429.
        timeout: Seconds for a request.
        together: Whether calls are batched.
    """
    bounds = limits or Limits()
    batcher = Batcher(engine.run, budget, most_waiting, together)
    meters = _Meters()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()

    def authorised(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = [
            hmac.compare_digest(given.encode(), key.encode()) for key in keys
        ]  # each one, whichever fits
        if keys and (scheme.lower() != "bearer" or not any(right)):
            raise ClientError("no valid API key. Send it as 'Authorization: Bearer KEY'.", 401)

    app = FastAPI(
        title="ReMatch", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(_Guard, limits=bounds, meters=meters)
    answer_errors(app)
    secured: dict[str, Any] = {"dependencies": [Depends(authorised)], "responses": _ANSWERS}

    async def compute(
        request: Request, calls: Sequence[tuple[tuple[Any, ...], Any, int]]
    ) -> list[Any]:
        return await _while_wanted(request, batcher(calls), timeout)

    async def measured(request: Request, values: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of each input; what becomes of a picture only the model's thread may find out."""
        if any("image" in value for value in values):
            return await compute(request, [(("measure",), value, 0) for value in values])
        return await run_in_threadpool(engine.text_tokens, [value["text"] for value in values])

    @app.post("/v1/embeddings", **secured)
    async def embeddings(request: Request, asked: EmbeddingRequest) -> EmbeddingResponse:
        """Vectors of texts, or of the content of messages with pictures."""
        task = asked.task or _TASKS.get(asked.input_type or "document")
        if task is None:
            raise ClientError(
                f"input_type {asked.input_type!r} is unknown; use query or document."
            )
        given = await run_in_threadpool(_inputs_of, asked, bounds)
        width = engine.model.backbone.width
        if asked.dimensions and asked.dimensions > width:
            raise ClientError(f"dimensions {asked.dimensions}: the vectors have {width}.")
        tokens = await measured(request, given)
        vectors = np.stack(
            await compute(request, [((task,), v, n) for v, n in zip(given, tokens, strict=True)])
        )
        vectors = truncate(vectors, asked.dimensions or width)
        data = [
            Embedding(index=i, embedding=_written(v, asked.encoding_format))
            for i, v in enumerate(vectors)
        ]
        usage = Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens))
        return EmbeddingResponse(data=data, model=engine.name, usage=usage)

    @app.post("/v1/rerank", **secured)
    @app.post("/v2/rerank", **secured)
    async def rerank(request: Request, asked: RerankRequest) -> RerankResponse:
        """Documents in the order of the matching head's P(yes)."""
        if len(asked.documents) > bounds.inputs:
            raise ClientError(
                f"{len(asked.documents)} documents; this server takes {bounds.inputs}.", 413
            )
        query, *documents = await run_in_threadpool(
            _multimodal, [asked.query, *asked.documents], bounds
        )
        tokens = await measured(request, [query, *documents])
        (scores,) = await compute(request, [(("match",), (query, documents), sum(tokens))])
        order = np.argsort(-scores, kind="stable")[: asked.top_n]
        return RerankResponse(
            id=str(uuid.uuid4()),
            model=engine.name,
            results=[
                RerankResult(
                    index=int(i),
                    relevance_score=float(scores[i]),
                    document=_told(asked.documents[i]) if asked.return_documents else None,
                )
                for i in order
            ],
            usage=Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
        )

    if engine.index is not None:

        @app.post("/v1/search", **secured)
        async def search(request: Request, asked: SearchRequest) -> SearchResponse:
            """The nearest documents of the index, perhaps reranked."""
            started = time.perf_counter()
            if not asked.text.strip() and asked.image is None:
                raise ClientError("no query. Send text, image, or both.")
            (query,) = await run_in_threadpool(
                _multimodal, [Multimodal(text=asked.text, image=asked.image)], bounds
            )
            (tokens,) = await measured(request, [query])
            kind = ("search", asked.top, asked.filter, asked.rerank)
            (hits,) = await compute(request, [(kind, query, tokens)])
            pictures = await run_in_threadpool(engine.with_pictures, hits)
            found = [
                SearchHit(
                    id=hit.id,
                    score=hit.score,
                    by=hit.by,
                    nearest=hit.nearest,
                    text=hit.text,
                    has_picture=hit.id in pictures,
                    metadata=hit.metadata,
                )
                for hit in hits
            ]
            return SearchResponse(
                hits=found, milliseconds=round(1000 * (time.perf_counter() - started), 1)
            )

        shown_as = _ANSWERS | {200: {"content": {"image/jpeg": {}}}}

        @app.get("/v1/documents/{name:path}/picture", responses=shown_as, response_class=Response)
        async def picture(
            request: Request, name: str, edge: int = Query(320, ge=16, le=2048)
        ) -> Response:
            """A document's picture as JPEG, its longer side ``edge`` pixels at most."""
            authorised(request)
            content = await run_in_threadpool(engine.picture, name, edge)
            return Response(
                content,
                media_type="image/jpeg",
                headers={"Cache-Control": "private, max-age=3600"},
            )

        @app.post("/v1/attention", **secured)
        async def attention(request: Request, asked: AttentionRequest) -> AttentionResponse:
            """Where the learnable tokens look in a picture."""
            if asked.id is not None:
                value, task = await run_in_threadpool(engine.document, asked.id), "document"
            else:
                given = [Multimodal(text=asked.text, image=asked.image)]
                value, task = (await run_in_threadpool(_multimodal, given, bounds))[0], "query"
            if "image" not in value:
                raise ClientError(
                    "there is no picture to look at. Send one, or the id of a document that has "
                    "one."
                )
            (tokens,) = await measured(request, [value])
            (maps,) = await compute(request, [(("attention", task), value, tokens)])
            shown = await run_in_threadpool(engine.shown, value["image"], maps)
            return AttentionResponse(together=shown[0], tokens=shown[1:])

        @app.get("/v1/examples", **secured)
        async def examples() -> list[str]:
            """A few texts of the index, to try."""
            return await run_in_threadpool(engine.examples)

        add_page(app)

    @app.get("/v1/models", **secured)
    def models() -> ModelList:
        """What is served."""
        tasks = ["embeddings", "rerank"] + ["search"] * (engine.index is not None)
        count = len(engine.index) if engine.index is not None else 0
        width = engine.model.backbone.width
        return ModelList(
            data=[ModelCard(id=engine.name, dimensions=width, documents=count, tasks=tasks)]
        )

    @app.get("/health")
    def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> dict[str, str | int]:
        """The model is loaded and takes requests."""
        return {"status": "ready", "waiting": len(batcher.waiting)}

    @app.get("/metrics", dependencies=[Depends(authorised)], response_class=PlainTextResponse)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


# ---- requests → inputs --------------------------------------------------------------------------


def _inputs_of(asked: EmbeddingRequest, limits: Limits) -> list[Any]:
    if (asked.input is None) == (asked.messages is None):
        raise ClientError("send either input or messages.")
    if asked.messages is not None:
        return [_of_messages(asked.messages, limits)]
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    assert texts is not None
    if not texts:
        raise ClientError("input is an empty list. Send at least one text.")
    if len(texts) > limits.inputs:
        raise ClientError(
            f"{len(texts)} inputs; this server takes {limits.inputs} in a request.", 413
        )
    return [_text(text, limits) for text in texts]


def _of_messages(messages: list[Message], limits: Limits) -> Any:
    if len(messages) != 1:
        raise ClientError(f"{len(messages)} messages; one is embedded at a time, so send one.")
    content = messages[0].content
    if isinstance(content, str):
        return _text(content, limits)
    urls = [part.image_url.url for part in content if isinstance(part, ImagePart)]
    if len(urls) > limits.images:
        raise ClientError(
            f"{len(urls)} pictures; this server takes {limits.images} in a request.", 413
        )
    text = " ".join(part.text for part in content if not isinstance(part, ImagePart))
    given: dict[str, Any] = _text(text, limits) if text.strip() else {}
    if urls:
        given["image"] = [picture_from(url, limits) for url in urls]
    if not given:
        raise ClientError("the message is empty. Send text, a picture, or both.")
    return given


def _multimodal(values: Sequence[str | Multimodal], limits: Limits) -> list[Any]:
    if sum(not isinstance(v, str) and v.image is not None for v in values) > limits.images:
        raise ClientError(f"this server takes {limits.images} pictures in a request.", 413)
    found: list[Any] = []
    for value in values:
        if isinstance(value, str):
            found.append(_text(value, limits))
            continue
        given: dict[str, Any] = _text(value.text, limits) if value.text.strip() else {}
        if value.image is not None:
            given["image"] = picture_from(value.image, limits)
        if not given:
            raise ClientError("an empty query or document. Give it text, a picture, or both.")
        found.append(given)
    return found


def _text(text: str, limits: Limits) -> dict[str, Any]:
    """As a dictionary, so that no text is ever taken for a path."""
    if not text.strip():
        raise ClientError("an empty text. Send something to read.")
    if len(text) > limits.text:
        raise ClientError(
            f"a text of {len(text):,} characters; this server takes {limits.text:,}.", 413
        )
    return {"text": text}


def _written(vector: Any, form: str) -> list[float] | str:
    return (
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if form == "base64"
        else vector.tolist()
    )


def _told(document: str | Multimodal) -> dict[str, Any]:
    return {"text": document if isinstance(document, str) else document.text}


# ---- around every request -----------------------------------------------------------------------


async def _while_wanted(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result, unless the client leaves or the time is up: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    until = time.monotonic() + seconds
    while True:
        done, _ = await asyncio.wait({task}, timeout=0.2)
        if done:
            return task.result()
        gone, late = await request.is_disconnected(), time.monotonic() > until
        if gone or late:
            task.cancel()
            await asyncio.wait({task})
            raise ClientError(
                f"not done within {seconds:g} seconds. Send less, or try again later.", 504
            )


class _Meters:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rematch_requests", "Requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rematch_request_seconds", "Time of a request", ["path"], registry=self.registry
        )


class _Guard:
    """Refuses bodies that are too large, adds security headers, counts."""

    def __init__(self, app: Any, limits: Limits, meters: _Meters) -> None:
        self.app, self.limits, self.meters = app, limits, meters

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, size = time.perf_counter(), 500, 0
        said = dict(scope["headers"]).get(b"content-length", b"0")

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise HTTPException(
                    413, f"more than {self.limits.body:,} bytes. Send less in one request."
                )
            return message

        async def marked(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        if said.isdigit() and int(said) > self.limits.body:
            answer = refusal(
                413, f"{int(said):,} bytes; this server takes {self.limits.body:,} in a request."
            )
            await answer(scope, receive, marked)
        else:
            await self.app(scope, counted, marked)
        route = scope.get("route")
        path = getattr(route, "path", "other")  # never what a client made up
        self.meters.requests.labels(path, status).inc()
        self.meters.seconds.labels(path).observe(time.perf_counter() - started)
