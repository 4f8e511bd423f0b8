"""What the routes of an application share, and how they get it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.inputs import Input
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
    """

    engine: Engine
    batcher: Batcher
    limits: Limits
    timeout: float
    metrics: Metrics

    async def tokens(self, request: Request, inputs: Sequence[Input]) -> list[int]:
        """How many tokens each input of a request has.

        Raises:
            ClientError: 429 or 503, if the inputs could not be computed now anyway; 504.
        """
        self.batcher.check_room(1)
        work = run_in_threadpool(self.engine.measure, inputs)
        return await _until_timeout(request, work, self.timeout)

    async def compute(
        self,
        request: Request,
        key: Hashable,
        compute: Callable[[list[Value]], Sequence[Result]],
        values: Sequence[Value],
        tokens: Sequence[int],
    ) -> list[Result]:
        """The results for a request's values; arguments as for
        :meth:`~rematch.serve.batching.Batcher.run`.

        Raises:
            ClientError: 429, 503 or 504.
        """
        work = self.batcher.run(key, compute, values, tokens)
        return await _until_timeout(request, work, self.timeout)


async def _until_timeout(request: Request, work: Awaitable[Result], seconds: float) -> Result:
    """The result of ``work``, which is cancelled if the client disconnects or time runs out."""
    task = asyncio.ensure_future(work)
    deadline = time.monotonic() + seconds
    while True:
        done, _ = await asyncio.wait({task}, timeout=0.2)
        if done:
            return task.result()
        if await request.is_disconnected() or time.monotonic() > deadline:
            task.cancel()
            await asyncio.wait({task})
            raise ClientError(
                f"not done within {seconds:g} seconds. Send less, or try again later.", 504
            )


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
