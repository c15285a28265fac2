"""Renders answers. Vectors go from float32 bytes to JSON or base64 without ever becoming Python numbers."""

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ranklet.cluster.message import EmbedResult, InferenceReply


@dataclass(frozen=True)
class Embeddings:
    """The answer to one request, joined from the replies to its calls."""

    vectors: NDArray[np.float32]  # float32 [prompts, dimensions]
    prompt_tokens: int
    headers: dict[str, str]
    queue_s: float  # the longest wait of a prompt in a replica's queue
    compute_s: float  # the longest batch
    came_ns: int  # when the last reply came, since the epoch


def join(replies: Sequence[InferenceReply[EmbedResult]]) -> Embeddings:
    """One answer of `replies`, in their order."""
    results = [reply.result for reply in replies]
    vectors = [np.frombuffer(each.vectors, dtype="<f4").reshape(-1, each.dimensions) for each in results]
    return Embeddings(
        vectors=vectors[0] if len(vectors) == 1 else np.concatenate(vectors),
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        headers={name: value for name, value in _headers(replies) if value},
        queue_s=max(reply.queue_s for reply in replies),
        compute_s=max(reply.compute_s for reply in replies),
        came_ns=time.time_ns(),
    )


def _headers(replies: Sequence[InferenceReply[EmbedResult]]) -> Iterable[tuple[str, str]]:
    """Where the answer comes from; several values when a large request was split."""
    yield "x-ranklet-replica", _distinct(reply.replica for reply in replies)
    yield "x-ranklet-revision", _distinct(reply.revision for reply in replies)
    yield "x-ranklet-tier", _distinct(reply.tier for reply in replies)
    yield "x-ranklet-backend", _distinct(reply.backend for reply in replies)


def _distinct(values: Iterable[str | None]) -> str:
    return ",".join(dict.fromkeys(value for value in values if value))


def render(answer: Embeddings, model: str, encoding_format: str | None) -> bytes:
    """Body of a successful answer. `base64` is of little-endian float32, as OpenAI's clients expect."""
    encoded = encoding_format == "base64"
    body = {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if encoded else vector}
            for index, vector in enumerate(answer.vectors)
        ],
        "usage": {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens},
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.tobytes()).decode("ascii")


def model_card(name: str, *, base: str | None, root: str, created_s: int, max_model_len: int | None) -> dict[str, Any]:
    """One entry of `GET /v1/models`; `base` is the parent of an adapter, None for the base itself."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "ranklet",
        "root": root,
        "parent": base,
        "max_model_len": max_model_len,
    }
