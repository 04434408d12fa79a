"""Reads a request's body up to a limit, without reading more of it than that."""

from __future__ import annotations

from starlette.requests import Request

from serving.core.errors import RequestError, RequestTooLarge


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises RequestTooLarge by the announced length, or as soon as more than `max_bytes` have come."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    if not num_bytes:
        raise RequestError("the body is empty; send a JSON object", code="invalid_json")
    return b"".join(parts)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes; send less", code="request_too_large")
