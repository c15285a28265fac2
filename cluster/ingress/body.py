"""Reads a request's body up to a size limit."""

import asyncio

from starlette.requests import Request

from ranklet.replicas.errors import RankletError

# A client that is still sending does not read the answer, and closing the connection would lose the 413. So the rest of
# the body is read and discarded, up to this multiple of the limit.
_DRAIN_FACTOR = 8


class BodyTooLarge(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """The body exceeds limits.max_body_bytes."""

    code, status = "body_too_large", 413


class BodyTooSlow(RankletError):  # noqa: N818
    """The body was not complete within limits.body_timeout_s."""

    code, status = "body_timeout", 408


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """Read the whole body, holding at most `limit_bytes` in memory.

    Raises:
        BodyTooLarge: the body exceeds `limit_bytes`.
        BodyTooSlow: the body is not complete within `timeout_s`.
        starlette.requests.ClientDisconnect: the client disconnected while sending.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(
            f"body: expected the complete body within {timeout_s:g} s (limits.body_timeout_s), got part of it. "
            "Send fewer texts per request",
            param="body",
        ) from None


async def _read(request: Request, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    too_large = _content_length(request) > limit_bytes
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            too_large = True
            chunks.clear()
            if size > limit_bytes * _DRAIN_FACTOR:
                break
        elif not too_large:
            chunks.append(chunk)
    if too_large:
        raise BodyTooLarge(
            f"body: expected at most {limit_bytes} bytes, got {max(size, _content_length(request))}. "
            "Send fewer texts per request, or raise limits.max_body_bytes",
            param="body",
        )
    return b"".join(chunks)


def _content_length(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0
