"""Calls that wait while the model computes are computed together.

One thread computes. Meanwhile, calls wait in a bounded queue. When the thread is free, it takes
the first call, and with it those calls that have the same key and fit into the batch tokens. The
thread never waits for a batch to fill: a single call starts at once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from rematch.serve.limits import ClientError

Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Call:
    key: Hashable
    compute: Callable[[list[Any]], Sequence[Any]]
    value: Any
    tokens: int
    result: asyncio.Future[Any]


class Batcher:
    """A queue in front of the thread that computes.

    Args:
        batch_tokens: Tokens of a batch, padding included.
        waiting: Longest queue; further calls are refused.
        batching: Whether calls are batched; otherwise they are computed one at a time.
    """

    def __init__(self, batch_tokens: int, waiting: int, batching: bool = True) -> None:
        self.batch_tokens = batch_tokens
        self.waiting = waiting
        self.batching = batching
        self.queue: deque[_Call] = deque()
        self.batches = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    async def run(
        self,
        key: Hashable,
        compute: Callable[[list[Value]], Sequence[Result]],
        values: Sequence[Value],
        tokens: Sequence[int],
    ) -> list[Result]:
        """Compute a result for each value, in batches with other calls.

        Either all values are queued or none. If the caller is cancelled, its values leave the
        queue.

        Args:
            key: Only calls with equal keys share a batch; they must compute the same.
            compute: Takes a batch of values and returns one result for each; it runs in the
                thread.
            values: The values.
            tokens: Length of each value.

        Raises:
            ClientError: 429 if the queue is full, 503 if the server is shutting down.
        """
        self.check_room(len(values))
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        calls = [
            _Call(key, compute, value, length, loop.create_future())
            for value, length in zip(values, tokens, strict=True)
        ]
        self.queue.extend(calls)
        self._arrived.set()
        try:
            results: list[Result] = await asyncio.gather(*(call.result for call in calls))
            return results
        finally:  # if one call fails or the caller is cancelled, the others are dropped
            for call in calls:
                call.result.cancel()

    def check_room(self, calls: int) -> None:
        """Check that calls can be queued.

        Raises:
            ClientError: 429 if the queue is full, 503 if the server is shutting down.
        """
        if self._closing:
            raise ClientError("the server is shutting down. Try again.", 503)
        # an empty queue takes a request of any size, which could never be served otherwise
        if self.queue and len(self.queue) + calls > self.waiting:
            raise ClientError("too many requests are waiting. Try again in a second.", 429)

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if batch:
                self.batches += 1
                await self._compute(batch)
                continue
            self._arrived.clear()
            if self._closing:
                return

    async def _compute(self, batch: list[_Call]) -> None:
        loop = asyncio.get_running_loop()
        values = [call.value for call in batch]
        try:
            results = await loop.run_in_executor(self._thread, batch[0].compute, values)
        except Exception as error:
            if len(batch) > 1:  # compute them one by one, so that only those at fault fail
                for call in batch:
                    await self._compute([call])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for call, result in zip(batch, results, strict=True):
            if not call.result.done():
                call.result.set_result(result)

    def _next_batch(self) -> list[_Call]:
        """Take the next batch from the queue, and drop cancelled calls."""
        batch: list[_Call] = []
        remaining: deque[_Call] = deque()
        longest = 0
        for call in self.queue:
            if call.result.done():
                continue
            length = max(longest, call.tokens)
            fits = not batch or (
                self.batching
                and call.key == batch[0].key
                and length * (len(batch) + 1) <= self.batch_tokens
            )
            if fits:
                batch.append(call)
                longest = length
            else:
                remaining.append(call)
        self.queue = remaining
        return batch

    async def close(self) -> None:
        """Refuse new calls, and finish those that are queued."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()
