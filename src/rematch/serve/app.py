"""The HTTP API: OpenAI's embeddings, Jina's and Cohere's rerank, search.

:func:`create_app` assembles the application around an :class:`~rematch.serve.engine.Engine`.
Requests are checked, and pictures decoded and measured, in a pool of threads; the model computes
in a thread of its own (:mod:`rematch.serve.batching`). The event loop does neither.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from rematch import __version__
from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.error_responses import add_error_handlers
from rematch.serve.limits import Limits
from rematch.serve.middleware import Guard, Metrics
from rematch.serve.page import add_page
from rematch.serve.routes import embeddings, rerank, search, status
from rematch.serve.service import ERRORS, Service


def create_app(
    engine: Engine,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    *,
    batch_tokens: int = 4096,
    waiting: int = 512,
    timeout: float = 60.0,
    batching: bool = True,
    most_rerank: int = 200,
) -> FastAPI:
    """The application; it has search and the search page if the engine has an index.

    Args:
        engine: The model, and an index if there is one.
        limits: Limits of a request.
        keys: API keys, one of which a client must send as ``Authorization: Bearer KEY``; without
            any, no key is needed.
        batch_tokens: Tokens of a batch, padding included.
        waiting: Longest queue; further calls are refused with 429.
        timeout: Seconds after which a request is answered with 504.
        batching: Whether calls that wait are computed together.
        most_rerank: Documents that a stage of a search may rerank.
    """
    limits = limits or Limits()
    batcher = Batcher(
        batch_tokens,
        waiting,
        batching,
        timeout=timeout,
        seconds_per_token=engine.seconds_per_token,
    )
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()

    app = FastAPI(
        title="ReMatch", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = Service(engine, batcher, limits, timeout, metrics, most_rerank)
    app.add_middleware(Guard, limits=limits, keys=keys, metrics=metrics)
    add_error_handlers(app)
    routers = [embeddings.router, rerank.router]
    if engine.index is not None:
        routers.append(search.router)
        add_page(app, most_rerank)
    for router in routers:
        app.include_router(router, responses=ERRORS)
    app.include_router(status.router)
    return app
