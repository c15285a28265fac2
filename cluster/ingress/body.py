"""Reads a request's body up to a size limit, and inflates it."""

import asyncio
import zlib

from starlette.requests import Request

from ranklet.cluster.ingress.body_room import BodyShare
from ranklet.replicas.errors import InvalidRequest, RankletError

# A client that is still sending does not read the answer, and closing the connection would lose the 413. So the rest of
# the body is read and discarded, up to this multiple of the limit.
_DRAIN_FACTOR = 8
_INFLATED = ("gzip", "x-gzip", "deflate")
_ANY_ZLIB_HEADER = zlib.MAX_WBITS | 32  # of gzip or zlib


class BodyTooLarge(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """The body exceeds limits.max_body_bytes."""

    code, status = "body_too_large", 413


class BodyTooSlow(RankletError):  # noqa: N818
    """The body was not complete within limits.body_timeout_s."""

    code, status = "body_timeout", 408


class UnsupportedEncoding(RankletError):  # noqa: N818
    """The header Content-Encoding names a compression that is not supported."""

    code, status = "unsupported_content_encoding", 415


async def read_body(request: Request, limit_bytes: int, timeout_s: float, share: BodyShare | None = None) -> bytes:
    """Read the whole body, holding at most `limit_bytes` in memory; of a compressed one, twice as much.

    Args:
        share: counts what is held; None for small limits.

    Raises:
        Saturated: the gateway has no room for the body.
        BodyTooLarge: the body exceeds `limit_bytes`, before or after it is inflated.
        BodyTooSlow: the body is not complete within `timeout_s`.
        UnsupportedEncoding: the body is compressed otherwise than by gzip or deflate.
        InvalidRequest: the body is not what Content-Encoding says.
        starlette.requests.ClientDisconnect: the client disconnected while sending.
    """
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, limit_bytes, share)
    except TimeoutError:
        raise BodyTooSlow(
            f"body: expected the complete body within {timeout_s:g} s (limits.body_timeout_s), got part of it. "
            "Send fewer texts per request",
            param="body",
        ) from None

    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding in _INFLATED:
        content = await asyncio.to_thread(_inflate, body, encoding, limit_bytes)
        if share is not None:
            share.grow(len(content))
        return content
    raise UnsupportedEncoding(
        f"Content-Encoding: expected gzip, deflate or none, got {encoding[:60]!r}", param="content-encoding"
    )


def _inflate(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(_ANY_ZLIB_HEADER)
    try:
        content = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise _not_encoded(encoding, str(error)) from None
    if len(content) > limit_bytes:
        raise BodyTooLarge(
            f"body: expected at most {limit_bytes} bytes after it is inflated, got more. Send fewer texts per request, "
            "or raise limits.max_body_bytes",
            param="body",
        )
    if not inflater.eof or inflater.unused_data:
        raise _not_encoded(encoding, "more data after its end" if inflater.eof else "a part of it")
    return content


def _not_encoded(encoding: str, got: str) -> InvalidRequest:
    return InvalidRequest(
        f"body: expected one whole {encoding} stream, since content-encoding is {encoding}, got: {got}", param="body"
    )


async def _read(request: Request, limit_bytes: int, share: BodyShare | None) -> bytes:
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
            if share is not None:
                share.grow(size)
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
