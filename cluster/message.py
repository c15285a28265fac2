"""What travels between gateway and replica: token ids and vectors as bytes, refusals as data.

Exceptions do not travel. Ray would wrap them, log them as failures of the replica, and pickle their tracebacks. What
travels has no slots: frozen and with slots, its pickling is Python code and takes twice as long.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import (
    AdapterNotFound,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Saturated,
    StillLoading,
    Unavailable,
    UnknownModel,
)
from ranklet.routing.report import QueueLoad

# Serve's gRPC transport refuses messages above 4 MiB; half of it leaves room. Fewer prompts per call than a large
# request has let several replicas share it.
MAX_MESSAGE_BYTES = 2 << 20
MAX_MESSAGE_PROMPTS = 512


@dataclass(frozen=True)
class ReplicaDescription:
    """Identity, health and limits of one replica."""

    id: str
    rank: int  # assigned by Serve; a replacement gets the same one
    pid: int
    healthy: bool
    metrics_target: str  # host:port of its exporter, "" if it has none
    limits: RequestLimits
    resident: tuple[str, ...]  # adapters in slots

    @property
    def labels(self) -> dict[str, str]:
        """Labels of this process in Prometheus."""
        return {"role": "replica", "replica": self.id, "rank": str(self.rank)}


@dataclass(frozen=True)
class GatewayDescription:
    """Identity of one gateway."""

    id: str
    pid: int
    metrics_target: str  # host:port of its exporter, "" if it has none

    @property
    def labels(self) -> dict[str, str]:
        """Labels of this process in Prometheus."""
        return {"role": "gateway", "replica": self.id}


_BY_CODE: dict[str, type[RankletError]] = {
    kind.code: kind
    for kind in (InvalidRequest, UnknownModel, AdapterNotFound, Unavailable, StillLoading, InternalError)
}


@dataclass(frozen=True)
class EmbedCall:
    """Prompts of one request, all for one adapter."""

    adapter: AdapterLocation | None  # None: the base model
    tokens: bytes  # int32 [sum of lengths]
    lengths: bytes  # int32 [prompts]
    dimensions: int | None
    sender: str  # the gateway's id

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    @property
    def total_tokens(self) -> int:
        return len(self.tokens) // 4

    def prompts(self) -> list[NDArray[np.int32]]:
        """int32 [length] each; views of the message."""
        tokens, lengths = (np.frombuffer(each, dtype=np.int32) for each in (self.tokens, self.lengths))
        return [tokens] if len(lengths) == 1 else np.split(tokens, np.cumsum(lengths)[:-1])


@dataclass(frozen=True)
class EmbedReply:
    """The vectors of one call, in its order. Times in seconds."""

    vectors: bytes  # float32 [prompts, dimensions]
    dimensions: int
    prompt_tokens: int
    tier: str | None
    backend: str
    replica: str
    revision: str | None  # of the adapter
    queue_s: float
    compute_s: float
    load: QueueLoad  # of the replica, now


@dataclass(frozen=True)
class EmbedRefusal:
    """A refusal as data; `error()` gives the exception back."""

    code: str
    message: str
    replica: str
    param: str | None = None
    findings: tuple[str, ...] = ()
    adapter: str = ""
    retry_after_s: float = 1.0
    load: QueueLoad | None = None

    @classmethod
    def of(cls, error: RankletError, replica: str, adapter: str, load: QueueLoad | None) -> "EmbedRefusal":
        return cls(
            code=error.code,
            message=error.message,
            replica=replica,
            param=error.param,
            findings=getattr(error, "findings", ()),
            adapter=adapter,
            retry_after_s=getattr(error, "retry_after_s", 1.0),
            load=load,
        )

    def error(self) -> RankletError:
        if self.code == InvalidAdapter.code:
            return InvalidAdapter(self.adapter, self.findings)
        if self.code == Saturated.code:
            return Saturated(self.message, retry_after_s=self.retry_after_s)
        return _BY_CODE.get(self.code, InternalError)(self.message, param=self.param)


def pack(
    adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], dimensions: int | None, sender: str
) -> EmbedCall:
    """`prompts`: int32 [length] each."""
    lengths = np.fromiter((len(prompt) for prompt in prompts), dtype=np.int32, count=len(prompts))
    tokens = np.ascontiguousarray(np.concatenate(prompts), dtype=np.int32)
    return EmbedCall(adapter, tokens.tobytes(), lengths.tobytes(), dimensions, sender)


def split(prompts: Sequence[NDArray[np.int32]], vector_bytes: int) -> Iterator[Sequence[NDArray[np.int32]]]:
    """`prompts` in order, cut so that no call or reply exceeds the limits of a message; one prompt at least in each."""
    start = size = 0
    for index, prompt in enumerate(prompts):
        cost = max(4 * len(prompt), vector_bytes)
        full = size + cost > MAX_MESSAGE_BYTES or index - start == MAX_MESSAGE_PROMPTS
        if index > start and full:
            yield prompts[start:index]
            start, size = index, 0
        size += cost
    yield prompts[start:]
