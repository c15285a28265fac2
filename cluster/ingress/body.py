"""Reads a request's body up to a limit, and never keeps more than the limit."""

import asyncio

from starlette.requests import Request

from ranklet.cluster.ingress.refusals import BodyTooLarge, BodyTooSlow

# A client that is still sending does not read our answer, and closing on it would lose the 413: so the rest is read and
# thrown away, up to so many times the limit.
_DRAINED = 8


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it exceeds `limit_bytes`. At most that much was held in memory.
        BodyTooSlow: it was not there within `timeout_s`.
        starlette.requests.ClientDisconnect: the client went away while sending.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(
            f"body: expected it within {timeout_s:g} s (limits.body_timeout_s), but it is not complete. Send fewer "
            "texts per request",
            param="body",
        ) from None


async def _read(request: Request, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    too_large = _announced(request) > limit_bytes
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            too_large = True
            chunks.clear()
            if size > limit_bytes * _DRAINED:
                break
        elif not too_large:
            chunks.append(chunk)
    if too_large:
        raise BodyTooLarge(
            f"body: expected at most {limit_bytes} bytes, got {max(size, _announced(request))}. "
            "Send fewer texts per request, or raise limits.max_body_bytes",
            param="body",
        )
    return b"".join(chunks)


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0
