"""Checks of embeddings, and error codes, in the formats of several servers."""

import base64
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

OK = "ok"
BAD_ANSWER = "bad_answer"  # status 200 without what was asked for


def check_answer(status: int, raw: bytes, prompts: int, *, check_values: bool = False) -> tuple[str, int]:
    """Return `ok` and the prompts' tokens as the server counted them (0 if it did not), or an error code and 0.

    Args:
        check_values: Also decode the vectors and check that they are finite. Slower than all other checks.
    """
    try:
        content = orjson.loads(raw)
        if status != 200:
            return error_code(status, content), 0
        if len(content["data"]) != prompts or (check_values and not all(map(_is_finite, content["data"]))):
            return BAD_ANSWER, 0
        return OK, int((content.get("usage") or {}).get("prompt_tokens", 0))
    except (ValueError, KeyError, TypeError, AttributeError):
        return BAD_ANSWER if status == 200 else str(status), 0


def check_status(status: int, raw: bytes) -> str:
    """Return the error code of an answer whose status is not 200."""
    try:
        return error_code(status, orjson.loads(raw))
    except (ValueError, AttributeError):
        return str(status)


def error_code(status: int | str, content: Any) -> str:
    """Return the code in the body. OpenAI and vLLM send {"error": {code}}, SGLang {code}, others only a status."""
    error = content.get("error")
    fields = error if isinstance(error, dict) else content
    return str(fields.get("code") or fields.get("type") or status)


def _is_finite(entry: dict[str, Any]) -> bool:
    encoded = entry["embedding"]
    vector: NDArray[np.float32]
    if isinstance(encoded, str):
        vector = np.frombuffer(base64.b64decode(encoded), "<f4")
    else:
        vector = np.array(encoded, np.float32)
    return vector.ndim == 1 and len(vector) > 0 and bool(np.isfinite(vector).all())
