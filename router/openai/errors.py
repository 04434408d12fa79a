"""Every error as OpenAI's envelope: {"error": {message, type, param, code}}. One table from exception to response.

RequestError and below    their own status and kind
everything else           the table; an exception that is none of ours is 500 without its text
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.core import errors as e

SERVER_ERROR: Final = "server_error"

STATUS: Final[dict[type[Exception], tuple[int, str]]] = {
    e.BatonError: (500, SERVER_ERROR),
    e.ConfigError: (500, SERVER_ERROR),
    e.ModelFolderError: (500, SERVER_ERROR),
    e.StartupError: (500, SERVER_ERROR),
    e.RequestError: (400, e.RequestError.kind),
    e.AuthenticationError: (401, e.AuthenticationError.kind),
    e.ModelNotFound: (404, e.ModelNotFound.kind),
    e.RequestTooLarge: (413, e.RequestTooLarge.kind),
    e.Overloaded: (429, "rate_limit_error"),
    e.Unavailable: (503, "service_unavailable"),
    e.PeerError: (500, SERVER_ERROR),
    e.StaleError: (500, SERVER_ERROR),
    e.ManifestError: (500, SERVER_ERROR),
    e.PagesExhausted: (400, e.RequestError.kind),
}

_HTTP_TEXT: Final = {
    404: "there is nothing at {path}; the API is under /v1, see /v1/models",
    405: "{method} is not allowed at {path}",
}


def status_of(error: Exception) -> int:
    return STATUS.get(type(error), (500, SERVER_ERROR))[0]


def envelope(error: Exception) -> bytes:
    """JSON of the error object, without a line break; also what goes into a stream that has begun."""
    status, kind = STATUS.get(type(error), (500, SERVER_ERROR))
    ours = isinstance(error, e.BatonError)
    message = str(error) if ours else "internal error; the server's log has the details"
    param = error.param if isinstance(error, e.RequestError) else None
    code = error.code if isinstance(error, e.RequestError) else None
    return _encode(message, kind, param, code or _code(status))


def error_response(error: Exception) -> Response:
    headers = {}
    if isinstance(error, e.Overloaded | e.Unavailable) and error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, e.AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return Response(envelope(error), status_of(error), headers, "application/json")


async def on_baton_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """No such path, no such method, and whatever else the framework finds."""
    assert isinstance(error, HTTPException)
    text = _HTTP_TEXT.get(error.status_code, "{detail}")
    message = text.format(path=request.url.path, method=request.method, detail=error.detail)
    kind = e.RequestError.kind if error.status_code < 500 else SERVER_ERROR
    body = _encode(message, kind, None, _code(error.status_code))
    return Response(body, error.status_code, error.headers, "application/json")


def _code(status: int) -> str | None:
    return {
        404: "not_found",
        405: "method_not_allowed",
        413: "request_too_large",
        429: "overloaded",
        500: "internal_error",
        503: "unavailable",
    }.get(status)


def _encode(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
