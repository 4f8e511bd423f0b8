"""Requests that arrive while the model computes are computed together.

One thread computes. While it does, calls wait in a bounded queue; when it is free, it takes the
first one and those of the same kind that fit beside it into a budget of tokens. Nothing waits for
company: a lone request starts at once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rematch.serve.limits import ClientError


@dataclass(frozen=True)
class _Call:
    kind: Hashable
    value: Any
    tokens: int
    done: asyncio.Future[Any]


class Batcher:
    """A queue before a thread.

    Args:
        run: ``run(kind, values)`` → one result per value, in the thread.
        budget: Tokens of a batch, padding included.
        most_waiting: Calls in the queue, beyond which new ones are refused.
        together: Off: one call at a time.
    """

    def __init__(
        self,
        run: Callable[[Any, list[Any]], Sequence[Any]],
        budget: int,
        most_waiting: int,
        together: bool = True,
    ) -> None:
        self.run, self.budget, self.most_waiting, self.together = (
            run,
            budget,
            most_waiting,
            together,
        )
        self.waiting: deque[_Call] = deque()
        self.batches = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    async def __call__(self, calls: Sequence[tuple[Hashable, Any, int]]) -> list[Any]:
        """The results of (kind, value, tokens), all of them queued or none.

        Raises:
            ClientError: 429 if the queue is full, 503 if the server is shutting down.
        """
        if self._closing:
            raise ClientError("the server is shutting down. Try again.", 503)
        if len(self.waiting) + len(calls) > max(
            self.most_waiting, len(calls) if not self.waiting else 0
        ):
            raise ClientError("too many requests are waiting. Try again in a second.", 429)
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        mine = [_Call(kind, value, tokens, loop.create_future()) for kind, value, tokens in calls]
        self.waiting.extend(mine)
        self._arrived.set()
        try:
            return await asyncio.gather(*(call.done for call in mine))
        finally:  # of a request that was cancelled or timed out nothing stays behind
            for call in mine:
                call.done.cancel()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not batch:
                self._arrived.clear()
                if self._closing:
                    return
                continue
            self.batches += 1
            await self._compute(batch)

    async def _compute(self, batch: list[_Call]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(
                self._thread, self.run, batch[0].kind, [call.value for call in batch]
            )
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].done.done():
                    batch[0].done.set_exception(error)
                return
            for call in batch:  # one of them is to blame; the others shall not suffer for it
                await self._compute([call])
            return
        for call, result in zip(batch, results, strict=True):
            if not call.done.done():
                call.done.set_result(result)

    def _next(self) -> list[_Call]:
        """The first call and those like it that fit beside it; cancelled ones are dropped."""
        batch: list[_Call] = []
        left: deque[_Call] = deque()
        longest = 0
        while self.waiting:
            call = self.waiting.popleft()
            if call.done.done():
                continue
            widest = max(longest, call.tokens)
            fits = (
                call.kind == batch[0].kind and widest * (len(batch) + 1) <= self.budget
                if batch
                else True
            )
            if fits and (self.together or not batch):
                batch.append(call)
                longest = widest
            else:
                left.append(call)
        self.waiting = left
        return batch

    async def close(self) -> None:
        """Finish what was taken, refuse what comes."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()
