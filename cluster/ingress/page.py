"""The status page, with headers that let nothing but its own script run and nobody show it inside another page."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

_PAGE = Path(__file__).with_name("status.html")


def page_response() -> Response:
    body, headers = _page()
    return Response(body, headers=headers, media_type="text/html")


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    body = _PAGE.read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(body, b"script"),
        "style-src": _hashes(body, b"style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return body, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",  # for browsers that do not know frame-ancestors
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }


def _hashes(body: bytes, tag: bytes) -> str:
    """Return the sources that allow the elements `tag` of the page, by their content."""
    contents = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(each).digest()).decode() for each in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
