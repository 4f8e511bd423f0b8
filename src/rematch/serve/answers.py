"""Errors as a client gets them."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rematch.errors import RematchError
from rematch.serve.limits import ClientError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found",
    413: "too_large",
}
_KINDS |= {422: "invalid_request_error", 429: "overloaded", 503: "unavailable", 504: "timeout"}


def refusal(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = _KINDS.get(status, "server_error")
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(
        {"error": {"message": message, "type": kind, "code": status}}, status, headers
    )


def answer_errors(app: FastAPI) -> None:
    """Every error in that shape, without path or traceback."""

    @app.exception_handler(RematchError)
    async def ours(_: Request, error: RematchError) -> JSONResponse:
        return refusal(error.status if isinstance(error, ClientError) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return refusal(422, f"{place}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return refusal(500, "something went wrong on the server; its log tells what.")
