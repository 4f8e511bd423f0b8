"""What happens around every request: key, body, security headers, metrics.

The key is checked on the headers, before any of the body is read. The body is then read within a
deadline, and its values are counted before anything is built from it: parsing holds the
interpreter, so that no thread could do it on the side.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rematch.serve.error_responses import SECURITY_HEADERS, error_response
from rematch.serve.limits import ClientError, Limits

_OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")  # and all below /page/
_SMALL_BODY = 64 << 10  # bytes; as many are always received, for there are few connections
_QUICKLY_COUNTED = 1 << 20  # bytes
_LOG = logging.getLogger("uvicorn.error")


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rematch_requests", "Requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rematch_request_seconds", "Time of a request", ["path"], registry=self.registry
        )


class Guard:
    """ASGI middleware that lets in what is worth computing, and answers the rest itself.

    Every answer gets security headers and is counted, those to unforeseen exceptions included.

    Args:
        app: The next ASGI application.
        limits: Limits of a request.
        keys: API keys, one of which a request must have for all but the page, the API's
            description and the server's state; without any, no key is needed.
        metrics: Where requests are counted.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Sequence[str], metrics: Metrics
    ) -> None:
        self.app = app
        self.limits = limits
        self.keys = [key.encode() for key in keys]
        self.metrics = metrics
        self.receiving = 0  # bytes of large bodies that are not complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        try:
            self._check_headers(scope)
            body = await self._body(receive)
            if body is None:
                status = 499  # nobody is there to be answered
                return
            await self.app(scope, _replay(body, receive), send_with_headers)
        except ClientError as error:
            response = error_response(error.status, str(error))
            if error.status in (400, 408):  # where the next request starts cannot be trusted
                response.headers["Connection"] = "close"
            await response(scope, receive, send_with_headers)
        except Exception:
            if status:
                raise
            _LOG.exception("Exception in the HTTP API")
            response = error_response(
                500, "internal server error. The server's log has the details."
            )
            await response(scope, receive, send_with_headers)
        finally:
            # the route's template, not the path that the client sent, which may be anything
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status or 500).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _check_headers(self, scope: Scope) -> None:
        """Refuse a request by its headers alone.

        Raises:
            ClientError: 400, 401 or 413.
        """
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise ClientError("a request has Content-Length or Transfer-Encoding, not both.")
        path = scope["path"]
        if self.keys and path not in _OPEN_PATHS and not path.startswith("/page/"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # compare with every key, so that the time does not tell which one matches
            matches = [hmac.compare_digest(key.strip(), valid_key) for valid_key in self.keys]
            if scheme.lower() != b"bearer" or not any(matches):
                raise ClientError("no valid API key. Send it as 'Authorization: Bearer KEY'.", 401)
        length = headers.get(b"content-length", b"0")
        if len(length) > 15 or (length.isdigit() and int(length) > self.limits.body):
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or ``None`` if the client disconnects meanwhile.

        Raises:
            ClientError: 408, 413 or 429.
        """
        body = bytearray()
        deadline = time.monotonic() + self.limits.body_seconds
        charged = 0
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), deadline - time.monotonic())
                except asyncio.TimeoutError:
                    raise ClientError(
                        f"the body is not complete after {self.limits.body_seconds:g} seconds.",
                        408,
                    ) from None
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > self.limits.body:
                    raise self._too_large()
                if len(body) > _SMALL_BODY:
                    if self.receiving - charged + len(body) > self.limits.receiving:
                        raise ClientError(
                            "too much is being received. Try again in a second.", 429
                        )
                    self.receiving += len(body) - charged
                    charged = len(body)
                if not message.get("more_body", False):
                    break
        finally:
            self.receiving -= charged
        content = bytes(body)
        if len(content) > _QUICKLY_COUNTED:
            await run_in_threadpool(self._check_values, content)
        else:
            self._check_values(content)
        return content

    def _check_values(self, body: bytes) -> None:
        if count_values(body, self.limits.values) > self.limits.values:
            raise ClientError(
                f"a body of more than {self.limits.values:,} values. Send less in one request.",
                413,
            )

    def _too_large(self) -> ClientError:
        return ClientError(
            f"a body of more than {self.limits.body:,} bytes. Send less in one request.", 413
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """What an application receives from when its request's body has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def count_values(body: bytes, limit: int) -> int:
    r"""How many values JSON has at most, by its punctuation outside of strings; nothing is parsed.

    Args:
        body: The JSON, or anything else.
        limit: From which number on the count need not be exact.

    >>> count_values(rb'{"a,b": [1, "\"[,", {}]}', 100)
    7
    """
    if b"\\" in body:
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = body.count(b'"')
    if quotes > 4 * limit:  # two of each string, and a value is a string, after another as its key
        return quotes
    outside = b"".join(body.split(b'"')[::2])
    return 1 + sum(map(outside.count, (b",", b":", b"[", b"{")))
