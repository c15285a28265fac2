"""JSON over HTTP for the command line. Ignores the environment's proxies."""

import http.client
import json
import urllib.request
from typing import Any


def fetch_json(
    url: str, *, timeout_s: float, token: str | None = None, method: str = "GET", body: dict[str, Any] | None = None
) -> Any:
    """Send a request and return the JSON of its answer; None for an empty answer.

    Args:
        token: sent as a bearer token, if it is not empty.

    Raises:
        OSError: there is no HTTP server at `url`; `urllib.error.HTTPError` if its status is an error.
        ValueError: the URL is malformed, the token is no header's value, or the answer is not JSON.
    """
    content = None if body is None else json.dumps(body).encode()
    key = clean_key(token)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, content, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            text = answer.read()
            return json.loads(text) if text else None
    except http.client.HTTPException as error:  # urllib passes it on for an answer that is not HTTP or is cut off
        raise OSError(f"expected an answer in HTTP, got {type(error).__name__}: {error}") from error


def clean_key(key: str | None) -> str | None:
    """Return an API key without the line end that files and secrets have behind it.

    Raises:
        ValueError: the key cannot be sent. The message does not contain it.
    """
    stripped = (key or "").strip()
    if not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ValueError(
            "API key: expected printable ASCII characters without blanks, got others. The key is not shown here"
        )
    return stripped or None
