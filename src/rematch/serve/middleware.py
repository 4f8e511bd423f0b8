"""What happens around every request: a limit on the body, security headers, metrics."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rematch.serve.error_responses import error_response

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    ),
)


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
    """ASGI middleware that refuses large bodies, adds security headers and counts requests.

    Args:
        app: The next ASGI application.
        max_body: Largest body in bytes.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, max_body: int, metrics: Metrics) -> None:
        self.app = app
        self.max_body = max_body
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(
                    413, f"more than {self.max_body:,} bytes. Send less in one request."
                )
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_SECURITY_HEADERS]
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            response = error_response(
                413, f"{int(length):,} bytes; this server takes {self.max_body:,} in a request."
            )
            await response(scope, receive, send_with_headers)
        else:
            await self.app(scope, limited_receive, send_with_headers)
        # the route's template, not the path that the client sent, which may be anything
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
