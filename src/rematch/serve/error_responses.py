"""Errors as JSON responses in OpenAI's format, without paths or tracebacks."""

import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rematch.errors import ImageError, RematchError
from rematch.serve.batching import OverloadedError
from rematch.serve.limits import ClientError

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    ),
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found",
    408: "timeout",
    413: "too_large",
    422: "invalid_request_error",
    429: "overloaded",
    503: "unavailable",
    504: "timeout",
}
_LONGEST = 500  # characters of a message
_PATH = re.compile(r"(?<![\w/])/(?:[^/\s'\"]+/)+")


def error_response(status: int, message: str) -> JSONResponse:
    """The response for an error with this HTTP status; of paths in it, the last part remains."""
    message = _PATH.sub("", message[:_LONGEST]).encode(errors="replace").decode()
    error = {"message": message, "type": _TYPES.get(status, "server_error"), "code": status}
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make the application answer its own exceptions with an :func:`error_response`."""

    @app.exception_handler(RematchError)
    async def rematch_error(_: Request, error: RematchError) -> JSONResponse:
        if isinstance(error, ImageError):  # a client's picture would have been a ClientError
            return error_response(404, "the document's picture is gone or broken.")
        status = error.status if isinstance(error, ClientError) else 400
        response = error_response(status, str(error))
        if isinstance(error, OverloadedError):
            response.headers["Retry-After"] = str(error.retry_after)
        return response

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return error_response(422, f"{field}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))
