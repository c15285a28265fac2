"""What an answer is worth: counted tokens, or the code of what went wrong, as several servers have it."""

import base64
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

OK = "ok"
BAD = "bad_answer"  # status 200, without the vectors that were asked for


def check_answer(status: int, raw: bytes, prompts: int, *, check_values: bool = False) -> tuple[str, int]:
    """`ok` and the prompts' tokens as the server counted them (0 if it did not), or an error's code and 0.

    Args:
        closely: decode the vectors too, and see that they are finite. Costs more than the rest.
    """
    try:
        said = orjson.loads(raw)
        if status != 200:
            return _code(status, said), 0
        if len(said["data"]) != prompts or (check_values and not all(map(_is_finite, said["data"]))):
            return BAD, 0
        return OK, int((said.get("usage") or {}).get("prompt_tokens", 0))
    except (ValueError, KeyError, TypeError, AttributeError):
        return BAD if status == 200 else str(status), 0


def _code(status: int, said: Any) -> str:
    """OpenAI's and vLLM's {"error": {code}}, SGLang's {code}; others' status."""
    told = said.get("error") or said
    return str(told.get("code") or told.get("type") or status)


def _is_finite(entry: dict[str, Any]) -> bool:
    given = entry["embedding"]
    vector: NDArray[np.float32]
    vector = np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given, np.float32)
    return vector.ndim == 1 and len(vector) > 0 and bool(np.isfinite(vector).all())
