"""Calls that wait while the model computes are computed together.

One thread computes. Meanwhile, calls wait in a queue. When the thread is free, it takes the first
call, and with it those calls that have the same key and fit into the batch tokens. The thread
never waits for a batch to fill: a single call starts at once.

What counts is the number of tokens that a call makes the model read. The pace of earlier batches
tells how long the queue will take. A call that would wait too long is refused when it arrives, or
as soon as the pace shows it. Between forward passes the thread calls :func:`check_wanted`, and
drops a batch for which nobody waits any longer.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rematch.serve.limits import ClientError

Value = TypeVar("Value")
Result = TypeVar("Result")

_WEIGHT_OF_LATEST = 0.3  # in the moving average of the pace
_LEAST_TOKENS = 100  # a pass of fewer takes about as long
_MOST_RISE = 4.0  # of a batch's pace over the average
# Shares of the timeout. A call is admitted if it will wait no longer than the first, whatever its
# own size, so that expensive ones get their turn; and if it will be done within the second, which
# is also checked while it waits. The rest is for errors of the pace, and for later calls of
# another key that are computed before.
_LONGEST_WAIT, _DONE = 0.3, 0.6
_thread = threading.local()  # its batch is the one that the thread computes


class AbandonedError(Exception):
    """Nobody waits any longer for what is being computed."""


class OverloadedError(ClientError):
    """There is too much work before a call: 429.

    Attributes:
        retry_after: Seconds after which it may be worth trying again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message, 429)
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(frozen=True)
class _Call:
    key: Hashable
    kind: Hashable
    compute: Callable[[list[Any]], Sequence[Any]]
    value: Any
    tokens: int
    result: asyncio.Future[Any]
    arrived: float = field(default_factory=lambda: time.monotonic())


@dataclass
class _Batch:
    """Calls that are computed together.

    Attributes:
        calls: The calls.
        started: When the computation started.
        progressed: When its latest forward pass started.
    """

    calls: list[_Call]
    started: float = field(default_factory=lambda: time.monotonic())
    progressed: float = field(default_factory=lambda: time.monotonic())

    def is_wanted(self) -> bool:
        return not all(call.result.done() for call in self.calls)


def check_wanted() -> None:
    """Stop the computation of a batch if nobody waits for it; call it between forward passes.

    Outside of a batch it does nothing.

    Raises:
        AbandonedError: If nobody waits.
    """
    batch: _Batch | None = getattr(_thread, "batch", None)
    if batch is None:
        return
    batch.progressed = time.monotonic()
    if not batch.is_wanted():
        raise AbandonedError


class Pace:
    """Seconds per token of each kind of call, a moving average over the batches.

    Args:
        seconds_per_token: What is assumed of a kind before its first batch.
    """

    def __init__(self, seconds_per_token: float) -> None:
        self.assumed = seconds_per_token
        self.measured: dict[Hashable, float] = {}

    def seconds(self, calls: Sequence[_Call]) -> float:
        """How long the calls will take."""
        seconds = 0.0
        tokens: dict[Hashable, int] = {}
        for call in calls:
            seconds += self.more_seconds(tokens, call)
            tokens[call.key] = tokens.get(call.key, 0) + call.tokens
        return seconds

    def more_seconds(self, tokens: Mapping[Hashable, int], call: _Call) -> float:
        """How much longer it will take with one more call.

        Args:
            tokens: Tokens of the other calls by their keys; those of a key share batches.
            call: The call.
        """
        others = tokens.get(call.key, 0)
        before = max(_LEAST_TOKENS, others) if others else 0
        more = max(_LEAST_TOKENS, others + call.tokens) - before
        return more * self.measured.get(call.kind, self.assumed)

    def learn(self, batch: _Batch, *, complete: bool) -> None:
        """Take the duration of a batch that has just ended into account.

        Args:
            batch: The batch.
            complete: Whether all of it was computed. Otherwise it would have taken longer, so that
                it may raise the average only.
        """
        kind = batch.calls[0].kind
        tokens = sum(call.tokens for call in batch.calls)
        latest = (time.monotonic() - batch.started) / max(_LEAST_TOKENS, tokens)
        average = self.measured.get(kind, self.assumed or latest)
        latest = min(latest, _MOST_RISE * average)  # the machine may have been suspended
        if complete or latest > average:
            self.measured[kind] = average + _WEIGHT_OF_LATEST * (latest - average)


class Batcher:
    """A queue in front of the thread that computes.

    Args:
        batch_tokens: Tokens of a batch, padding included.
        waiting: Longest queue; further calls are refused.
        batching: Whether calls are batched; otherwise they are computed one at a time.
        timeout: Seconds after which callers give up; calls for which they will not be enough are
            refused.
        seconds_per_token: Pace that is assumed until it can be measured.
    """

    def __init__(
        self,
        batch_tokens: int,
        waiting: int,
        batching: bool = True,
        *,
        timeout: float = math.inf,
        seconds_per_token: float = 0.0,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.waiting = waiting
        self.batching = batching
        self.timeout = timeout
        self.pace = Pace(seconds_per_token)
        self.queue: deque[_Call] = deque()
        self.batches = 0
        self._batch: _Batch | None = None
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
        kind: Hashable = None,
    ) -> list[Result]:
        """Compute a result for each value, in batches with other calls.

        Either all values are queued or none. If the caller is cancelled, its values leave the
        queue.

        Args:
            key: Only calls with equal keys share a batch; they must compute the same.
            compute: Takes a batch of values and returns one result for each; it runs in the
                thread.
            values: The values.
            tokens: How many tokens the model reads for each value.
            kind: Calls of one kind take about the same time per token; there are few kinds.

        Raises:
            ClientError: 429 if the queue is full or will take too long, 503 if the server is
                shutting down.
        """
        loop = asyncio.get_running_loop()
        calls = [
            _Call(key, kind, compute, value, length, loop.create_future())
            for value, length in zip(values, tokens, strict=True)
        ]
        self._check_room(calls)
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        self.queue.extend(calls)
        self._arrived.set()
        try:
            results: list[Result] = await asyncio.gather(*(call.result for call in calls))
            return results
        finally:  # if one call fails or the caller is cancelled, the others are dropped
            for call in calls:
                call.result.cancel()

    def check_room(self) -> None:
        """Check that a call could be queued.

        Raises:
            ClientError: As for :meth:`run`.
        """
        self._check_room([])

    def _check_room(self, calls: Sequence[_Call]) -> None:
        if self._closing:
            raise ClientError("the server is shutting down. Try again.", 503)
        waiting = [call for call in self.queue if not call.result.done()]
        if not waiting and self._batch is None:
            return  # a request of any size is served some time, whatever the pace seems to be
        # an empty queue takes any number of calls, which could never be served otherwise
        if waiting and len(waiting) + max(1, len(calls)) > self.waiting:
            raise OverloadedError("too many requests are waiting. Try again in a second.")
        seconds = self.pace.seconds(waiting)
        if self._batch is not None:
            expected = self.pace.seconds(self._batch.calls)
            seconds += max(0.0, expected - (time.monotonic() - self._batch.started))
        done = seconds + self.pace.seconds(calls)
        if seconds > _LONGEST_WAIT * self.timeout or done > _DONE * self.timeout:
            raise _too_late(done, seconds - _LONGEST_WAIT * self.timeout)

    def _refuse_late(self) -> None:
        """Refuse the calls in the queue that will be too late at the pace of now."""
        now = time.monotonic()
        seconds = 0.0
        tokens: dict[Hashable, int] = {}
        for call in self.queue:
            if not call.result.done():
                waited = now - call.arrived
                done = seconds + self.pace.more_seconds(tokens, call)
                has_waited = seconds > 0 or waited > (1 - _DONE) * self.timeout
                if has_waited and waited + done > _DONE * self.timeout:
                    call.result.set_exception(_too_late(done, seconds))
                else:
                    seconds = done
                    tokens[call.key] = tokens.get(call.key, 0) + call.tokens

    def stalled_seconds(self) -> float:
        """How long the thread has been computing a single forward pass; 0 if it has none."""
        return 0.0 if self._batch is None else time.monotonic() - self._batch.progressed

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._refuse_late()
            calls = self._next_calls()
            if calls:
                self.batches += 1
                await self._compute(calls)
                continue
            self._arrived.clear()
            if self._closing:
                return

    async def _compute(self, calls: list[_Call]) -> None:
        loop = asyncio.get_running_loop()
        self._batch = batch = _Batch(calls)
        try:
            results = await loop.run_in_executor(self._thread, _compute_batch, batch)
        except AbandonedError:
            self.pace.learn(batch, complete=False)
            return
        except Exception as error:
            if len(calls) > 1:  # compute them one by one, so that only those at fault fail
                for call in calls:
                    if not call.result.done():
                        await self._compute([call])
            elif not calls[0].result.done():
                calls[0].result.set_exception(error)
            return
        finally:
            self._batch = None
        self.pace.learn(batch, complete=True)
        for call, result in zip(calls, results, strict=True):
            if not call.result.done():
                call.result.set_result(result)

    def _next_calls(self) -> list[_Call]:
        """Take the calls of the next batch from the queue, and drop cancelled ones."""
        calls: list[_Call] = []
        remaining: deque[_Call] = deque()
        longest = 0
        for call in self.queue:
            if call.result.done():
                continue
            length = max(longest, call.tokens)
            fits = not calls or (
                self.batching
                and call.key == calls[0].key
                and length * (len(calls) + 1) <= self.batch_tokens
            )
            if fits:
                calls.append(call)
                longest = length
            else:
                remaining.append(call)
        self.queue = remaining
        return calls

    async def close(self) -> None:
        """Refuse new calls, and finish those in the queue for which somebody waits."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()


def _too_late(seconds: float, retry_after: float) -> OverloadedError:
    return OverloadedError(
        f"it would take about {seconds:.0f} seconds until this was done, which is too long. Send "
        "less, or try again later.",
        retry_after,
    )


def _compute_batch(batch: _Batch) -> Sequence[Any]:
    _thread.batch = batch
    try:
        return batch.calls[0].compute([call.value for call in batch.calls])
    finally:
        _thread.batch = None
