"""Joins the replies of replicas into the answer of one inference call, and renders it."""

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ranklet.cluster.message import Begun, EmbedResult, InferenceReply
from ranklet.cluster.text_result import GenerateResult


@dataclass(frozen=True)
class JoinedAnswer:
    """The fields that the answers of all tasks have.

    Attributes:
        headers: `x-ranklet-*` headers of the HTTP answer.
        queue_s: longest wait of a prompt in a replica's queue.
        compute_s: longest time of a batch.
        first_piece_s: shortest time of a replica's engine to its first tokens; None of embeddings.
        completed_ns: arrival of the last reply, in Unix time.
    """

    prompt_tokens: int
    headers: dict[str, str]
    queue_s: float
    compute_s: float
    first_piece_s: float | None
    completed_ns: int


@dataclass(frozen=True)
class Embeddings(JoinedAnswer):
    """The vectors of one request."""

    vectors: NDArray[np.float32]  # float32 [prompts, dimensions]

    @property
    def size_bytes(self) -> int:
        return self.vectors.nbytes


def join_texts(replies: Sequence[InferenceReply[GenerateResult]]) -> JoinedAnswer:
    """Join what the replies to the calls of one text request say besides their texts."""
    return JoinedAnswer(**_common(replies))


def begun_headers(begun: Iterable[Begun]) -> dict[str, str]:
    """Return the `x-ranklet-*` headers of a stream, which are sent before the replies arrive."""
    calls = list(begun)
    found = {
        "x-ranklet-replica": _distinct(call.replica for call in calls),
        "x-ranklet-revision": _distinct(call.revision for call in calls),
        "x-ranklet-tier": _distinct(call.tier for call in calls),
    }
    return {name: value for name, value in found.items() if value}


def join_embeddings(replies: Sequence[InferenceReply[EmbedResult]]) -> Embeddings:
    """Join the replies to the calls of one request. The vectors keep the order of the replies."""
    results = [reply.result for reply in replies]
    parts = [np.frombuffer(each.vectors, dtype="<f4").reshape(-1, each.dimensions) for each in results]
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Embeddings(**_common(replies), vectors=vectors)


def render_embeddings(answer: Embeddings, model: str, encoding_format: str | None) -> bytes:
    """Return the body of the HTTP answer. `base64` encodes little-endian float32, as OpenAI's clients expect."""
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


def _common(replies: Sequence[InferenceReply[Any]]) -> dict[str, Any]:
    return {
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "headers": {name: value for name, value in _headers(replies) if value},
        "queue_s": max(reply.queue_s for reply in replies),
        "compute_s": max(reply.compute_s for reply in replies),
        "first_piece_s": min((s for reply in replies if (s := reply.first_piece_s) is not None), default=None),
        "completed_ns": time.time_ns(),
    }


def _headers(replies: Sequence[InferenceReply[Any]]) -> Iterable[tuple[str, str]]:
    # A split request may have several values in one header.
    yield "x-ranklet-replica", _distinct(reply.replica for reply in replies)
    yield "x-ranklet-revision", _distinct(reply.revision for reply in replies)
    yield "x-ranklet-tier", _distinct(reply.tier for reply in replies)
    yield "x-ranklet-backend", _distinct(reply.backend for reply in replies)


def _distinct(values: Iterable[str | None]) -> str:
    return ",".join(dict.fromkeys(value for value in values if value))
