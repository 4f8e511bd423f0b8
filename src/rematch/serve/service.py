"""What the routes of an application share, and how they get it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import Depends, Request

from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError, Limits
from rematch.serve.middleware import Metrics
from rematch.serve.schemas import ErrorResponse

Value = TypeVar("Value")
Result = TypeVar("Result")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse}
    for status in (400, 401, 404, 408, 413, 422, 429, 500, 503, 504)
}


@dataclass(frozen=True)
class Service:
    """What an application serves, and on what terms.

    Attributes:
        engine: The model, and an index if there is one.
        batcher: The queue in front of the model's thread.
        limits: Limits of a request.
        timeout: Seconds after which a request is given up.
        metrics: Counts of requests.
        most_rerank: Documents that a stage of a search may rerank.
    """

    engine: Engine
    batcher: Batcher
    limits: Limits
    timeout: float
    metrics: Metrics
    most_rerank: int = 200

    async def in_thread(
        self, request: Request, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        """The result of a function in the pool of threads.

        Raises:
            ClientError: 504.
        """
        work = to_thread.run_sync(partial(function, *arguments), abandon_on_cancel=True)
        return await _until_deadline(request, work, self.timeout)

    async def prepare(
        self, request: Request, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        """:meth:`in_thread` for what prepares a computation.

        Raises:
            ClientError: 429 or 503, if the computation could not be queued now anyway; 504.
        """
        self.batcher.check_room()
        return await self.in_thread(request, function, *arguments)

    async def compute(
        self,
        request: Request,
        key: Hashable,
        compute: Callable[[list[Value]], Sequence[Result]],
        values: Sequence[Value],
        tokens: Sequence[int],
        kind: Hashable,
    ) -> list[Result]:
        """The results for a request's values; arguments as for
        :meth:`~rematch.serve.batching.Batcher.run`.

        Raises:
            ClientError: 429, 503 or 504.
        """
        work = self.batcher.run(key, compute, values, tokens, kind)
        return await _until_deadline(request, work, self.timeout)


async def _until_deadline(request: Request, work: Awaitable[Result], seconds: float) -> Result:
    """The result of ``work``, which is cancelled if nobody waits for it any longer.

    Args:
        request: The request that needs it; its time counts from its arrival.
        work: What is to be done.
        seconds: The request's time.

    Raises:
        ClientError: 504 if time runs out or the client disconnects.
    """
    task = asyncio.ensure_future(work)
    deadline = request.state.arrived + seconds
    try:
        while not task.done():
            remaining = deadline - time.monotonic()
            if remaining <= 0 or await request.is_disconnected():
                raise ClientError(
                    f"not done within {seconds:g} seconds. Send less, or try again later.", 504
                )
            await asyncio.wait({task}, timeout=min(0.2, remaining))
        return task.result()
    finally:
        task.cancel()


async def _service(request: Request) -> Service:
    request.state.arrived = time.monotonic()
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
