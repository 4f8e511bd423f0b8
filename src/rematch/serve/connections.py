"""Connections that wait for their clients are bounded, in time and in number.

uvicorn waits without end for the rest of a request's head, for a body after it was refused, and
for a client to read its answer; and it accepts connections until no file can be opened.
"""

import asyncio
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from rematch.serve.error_responses import SECURITY_HEADERS, error_response

_MOST_CONNECTIONS = 4096
_MOST_CHUNKS = 16_384  # of a body; reading each costs as much as reading kilobytes
_MOST_AHEAD = 1 << 20  # bytes of requests sent before the present one is answered
_LONGEST_HEAD = 16 << 10  # bytes


def server_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """Settings of uvicorn for an application, with bounded connections."""
    most = most_connections()
    return uvicorn.Config(
        app,
        http=type("Protocol", (BoundedProtocol,), {"most_connections": most}),
        ws="none",
        log_level="warning",
        server_header=False,
        backlog=max(16, most // 3),  # as many are accepted at once, before any can be dropped
        **settings,
    )


def most_connections() -> int:
    """A third of the files that the process may open, but not above 4,096."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(_MOST_CONNECTIONS, limit // 3))


class _Reader(h11.Connection):
    """Refuses bodies in too many chunks."""

    chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self.chunks += 1
            if self.chunks > _MOST_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        return event


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with bounds on what a connection waits for.

    Attributes:
        most_connections: When there are more, the one that has waited longest for its client is
            dropped.
        head_seconds: Seconds until the head of a request has to be complete, and the rest of a
            body after the request was refused.
        unread_seconds: Seconds in which a client has to read its answer.
    """

    most_connections = 512
    head_seconds = 10.0
    unread_seconds = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Reader(h11.SERVER, _LONGEST_HEAD)
        self._awaited = ""  # what the client must send next
        self._since = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._read_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the head, and drop a connection if there are too many."""
        super().connection_made(transport)
        self._update()
        if len(self.connections) > self.most_connections:
            self._drop_longest_waiting()

    def _drop_longest_waiting(self) -> None:
        alive: list[BoundedProtocol] = [
            connection
            for connection in self.connections
            if isinstance(connection, BoundedProtocol) and not connection.transport.is_closing()
        ]
        if len(alive) > self.most_connections:
            waiting = [connection for connection in alive if connection._awaited]
            min(waiting, key=lambda connection: connection._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all deadlines."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._read_deadline):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read, and wait for what comes next, unless the client sends far ahead of it."""
        super().data_received(data)
        self._update()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) > _MOST_AHEAD:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the client to read this answer."""
        super().on_response_complete()
        self._update()
        if self.transport.get_write_buffer_size():
            self._expect_reading()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._read_deadline is not None:
            self._read_deadline.cancel()

    def _update(self) -> None:
        """Start the deadline for what the client must send next, unless it is running already."""
        awaited = ""
        if self.conn.their_state is h11.IDLE:
            awaited = "head"
        elif self.conn.their_state is h11.SEND_BODY:
            refused = self.cycle is not None and self.cycle.response_complete
            awaited = "refused body" if refused else "body"
        if awaited == self._awaited:
            return
        self._awaited, self._since = awaited, self.loop.time()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if awaited in ("head", "refused body"):  # the application waits for a body
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _expect_reading(self) -> None:
        if self._read_deadline is not None:
            self._read_deadline.cancel()
        self._read_deadline = self.loop.call_later(self.unread_seconds, self._abort_unread)

    def _abort_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as the application answers errors, and hang up."""
        response = error_response(400, "not a valid HTTP request.")
        headers = [*response.raw_headers, *SECURITY_HEADERS, (b"connection", b"close")]
        try:
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun
            pass
        self.transport.close()
