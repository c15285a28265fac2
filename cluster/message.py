"""Messages between gateways and replicas.

Token ids and vectors travel as bytes, errors as data: Ray would wrap an exception, log it as a failure of the replica,
and pickle its traceback. The classes have no `__slots__`: frozen dataclasses with slots pickle in Python code, which
takes twice as long.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.reranking import Reranking
from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest, RankletError, error_class
from ranklet.replicas.grammar.constraint import Constraint
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.embedding_settings import EmbeddingSettings
from ranklet.routing.report import QueueLoad, StateReport

# Serve's gRPC transport refuses messages above 4 MiB; half of it leaves a margin for everything but tokens and results.
MAX_MESSAGE_BYTES = 2 << 20
# Smaller calls let several replicas share a large request.
MAX_MESSAGE_PROMPTS = 512

Params = TypeVar("Params")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Continuation:
    """Tokens that the texts of a call have already, because a replica that failed has made them.

    Attributes:
        tokens: int32 [sum of lengths].
        lengths: int32 [texts].
        base_revision: of the base model that made them; "" if it is not known.
    """

    tokens: bytes
    lengths: bytes
    base_revision: str

    def texts(self) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length]. They are views of the message."""
        return _arrays(self.tokens, self.lengths)


@dataclass(frozen=True)
class InferenceCall(Generic[Params]):
    """Prompts of one request for one adapter.

    A call that fails may be repeated on another replica. It then gives the tokens that its texts have already.

    Attributes:
        adapter: None for the base model.
        tokens: int32 [sum of lengths].
        lengths: int32 [prompts].
        params: parameters of the task, such as `EmbedParams`.
        sender: the gateway's id.
        number: the sender's number of a text call. It differs for each attempt at a call.
        continuation: None for a call whose texts are new.
        key_name: name of the request's API key, with which replicas share their time fairly; "" without keys.
    """

    adapter: AdapterLocation | None
    tokens: bytes
    lengths: bytes
    params: Params
    sender: str
    number: int = 0
    continuation: Continuation | None = None
    key_name: str = ""

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    @property
    def total_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def work(self) -> int:
        """Work of the call's prompts for routers, in prefill-equivalent tokens. Texts that it continues count too."""
        return self.total_tokens + (len(self.continuation.tokens) // 4 if self.continuation else 0)

    @property
    def texts(self) -> int:
        """Number of texts to generate."""
        return len(self.lengths) // 4 * self.params.n if isinstance(self.params, GenerateParams) else 0

    def prompts(self) -> list[NDArray[np.int32]]:
        """Return the token ids of each prompt, int32 [length]. They are views of the message."""
        return _arrays(self.tokens, self.lengths)


@dataclass(frozen=True)
class EmbedResult:
    """Vectors in the order of the call's prompts."""

    vectors: bytes  # float32 [prompts, dimensions]
    dimensions: int

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> "EmbedResult":
        return cls(vectors.tobytes(), vectors.shape[1])


@dataclass(frozen=True)
class Begun:
    """The first message of a text call on its gateway's feed: the engine is given the request.

    Attributes:
        number: the gateway's number of the call.
        revision: of the adapter; None for the base model.
        base_revision: of the base model.
        tier: as in `InferenceReply`, by what the replica knows before the engine has the request.
    """

    number: int
    replica: str
    revision: str | None
    tier: str | None
    base_revision: str


@dataclass(frozen=True)
class InferenceReply(Generic[Result]):
    """The result of one call, and how the replica computed it.

    Attributes:
        result: result of the task, such as `EmbedResult`.
        tier: where the adapter was when the call arrived: gpu, host, disk or remote; None for the base model.
        revision: of the adapter; None for the base model.
        queue_s: the longest wait of any prompt.
        compute_s: the longest batch of any prompt.
        load: the replica's queue when it replied.
        first_piece_s: time from the call's arrival in the engine to its first tokens; None of embeddings.
    """

    result: Result
    prompt_tokens: int
    tier: str | None
    backend: str
    replica: str
    revision: str | None
    queue_s: float
    compute_s: float
    load: QueueLoad
    first_piece_s: float | None = None


class OtherPrompts(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """The prompts of a call were not made as the adapter's folder says. The gateway makes them again."""

    code, status = "other_prompts", 503


def no_classifier(adapter: str) -> InvalidRequest:
    """Return the error for a request for vectors or texts of an adapter that computes scores."""
    return InvalidRequest(
        f"model: expected an adapter without a classification head, got {adapter!r}. It answers at /classify and, with "
        "one label, at /v1/rerank and /score",
        param="model",
    )


@dataclass(frozen=True)
class Refusal:
    """A RankletError as data. `has_begun` says whether the engine may have worked on the call."""

    code: str
    message: str
    replica: str
    param: str | None = None
    findings: tuple[str, ...] = ()
    adapter: str = ""
    retry_after_s: float = 1.0
    load: QueueLoad | None = None
    has_begun: bool = False

    @classmethod
    def of(
        cls, error: RankletError, replica: str, adapter: str, load: QueueLoad | None, *, has_begun: bool = False
    ) -> "Refusal":
        return cls(
            code=error.code,
            message=error.message,
            replica=replica,
            param=error.param,
            findings=getattr(error, "findings", ()),
            adapter=adapter,
            retry_after_s=error.retry_after_s,
            load=load,
            has_begun=has_begun,
        )

    def error(self) -> RankletError:
        if self.code == InvalidAdapter.code:
            return InvalidAdapter(self.adapter, self.findings)
        return error_class(self.code)(self.message, param=self.param, retry_after_s=self.retry_after_s)


@dataclass(frozen=True)
class AdapterText:
    """What an adapter's folder says about prompts and texts.

    Attributes:
        chat_template: None without one; the base model's applies.
        special_tokens: their texts by the names that chat templates use, such as eos_token.
        findings: why its tokenizer files cannot be used, such as tokens that the base model does not have.
        embedding: how its texts become vectors.
        constraint: of generated texts, unless the request has one.
        tool_format: name of the format of its calls of tools; None if the folder names none.
        reranking: how prompts of rerankers are made, if the folder says it.
        added_tokens: of its tokenizer, besides the base model's.
        invocation: as in `AdapterRef`.
    """

    revision: str
    chat_template: str | None
    special_tokens: dict[str, str]
    findings: tuple[str, ...] = ()
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    constraint: Constraint | None = None
    tool_format: str | None = None
    reranking: Reranking | None = None
    added_tokens: AddedTokens = field(default_factory=AddedTokens)
    invocation: Invocation | None = None


@dataclass(frozen=True)
class ReplicaDescription:
    """Identity, health and limits of one replica. `labels` are its labels in Prometheus."""

    id: str
    rank: int  # assigned by Serve; a replacement gets the same one
    pid: int
    problem: str | None  # why its engine is unhealthy; None if it is healthy
    metrics_target: str  # host:port of its exporter, "" if it has none
    limits: RequestLimits
    resident: tuple[str, ...]  # adapters in slots
    refused_settings: dict[str, str] = field(default_factory=dict)  # why, by the setting's name

    @property
    def labels(self) -> dict[str, str]:
        return {"role": "replica", "replica": self.id, "rank": str(self.rank)}


@dataclass(frozen=True)
class GatewayDescription:
    """Identity of one gateway. `labels` are its labels in Prometheus."""

    id: str
    pid: int
    metrics_target: str  # host:port of its exporter, "" if it has none
    refused_settings: dict[str, str] = field(default_factory=dict)  # why, by the setting's name

    @property
    def labels(self) -> dict[str, str]:
        return {"role": "gateway", "replica": self.id}


class ReportReceiver(Protocol):
    """The method of each gateway that replicas call."""

    async def on_report(self, report: StateReport) -> str:
        """Handle a replica's state report.

        Returns:
            This gateway's id, so that the replica learns which gateways it reached.
        """
        ...


def pack(
    adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], params: Params, sender: str,
    key_name: str = "",
) -> InferenceCall[Params]:  # fmt: skip
    """Make a call of `prompts`, int32 [length] each."""
    return InferenceCall(adapter, *pack_tokens(prompts), params, sender, key_name=key_name)


def pack_tokens(arrays: Sequence[NDArray[np.int32]]) -> tuple[bytes, bytes]:
    """Return token ids, end to end, and lengths, as the messages of this module carry them."""
    lengths = np.fromiter(map(len, arrays), dtype=np.int32, count=len(arrays))
    return np.ascontiguousarray(np.concatenate(arrays), dtype=np.int32).tobytes(), lengths.tobytes()


def _arrays(tokens: bytes, lengths: bytes) -> list[NDArray[np.int32]]:
    ids, counts = (np.frombuffer(each, dtype=np.int32) for each in (tokens, lengths))
    return [ids] if len(counts) == 1 else np.split(ids, np.cumsum(counts)[:-1])


def split(
    prompts: Sequence[NDArray[np.int32]], result_bytes: int, max_prompts: int | None = None
) -> Iterator[Sequence[NDArray[np.int32]]]:
    """Cut `prompts`, in order, into parts whose calls and replies stay within the limits of a message.

    Each part has at least one prompt, however large.

    Args:
        result_bytes: size of the result of one prompt.
        max_prompts: of a part; None for `MAX_MESSAGE_PROMPTS`.
    """
    start = size = 0
    for index, prompt in enumerate(prompts):
        cost = max(4 * len(prompt), result_bytes)
        full = size + cost > MAX_MESSAGE_BYTES or index - start == (max_prompts or MAX_MESSAGE_PROMPTS)
        if index > start and full:
            yield prompts[start:index]
            start, size = index, 0
        size += cost
    yield prompts[start:]
