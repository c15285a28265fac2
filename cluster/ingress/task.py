"""The interface of a task, such as embedding: the steps of an inference call that differ between endpoints."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from starlette.responses import Response

from ranklet.cluster.access.quota import Charge
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.intake import Inputs, Intake
from ranklet.cluster.ingress.observe import Observer, RequestRecord
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.token_meter import TokenMeter
from ranklet.replicas.engine.limits import RequestLimits


@dataclass(frozen=True)
class AdmittedCall:
    """An inference call whose prompts are tokenised, admitted and charged.

    Attributes:
        stream_limits: of this gateway.
        adapter: None for the base model.
        key_name: name of the API key; "" without keys.
        remake_prompts: prepares and tokenises the request again, after the adapter has changed.
    """

    replicas: ReplicasClient
    intake: Intake
    adapter: AdapterLocation | None
    prompts: TokenIds
    limits: RequestLimits
    stream_limits: LimitsConfig
    observer: Observer
    record: RequestRecord
    charge: Charge
    key_name: str
    remake_prompts: Callable[[], Awaitable[TokenIds]]

    @property
    def model(self) -> str:
        """Name of the adapter or base model that computes the answer."""
        return self.record.model

    def meter(self, *, streams: bool) -> TokenMeter:
        """Return what counts the generated tokens of this call."""
        return TokenMeter(self.observer, self.record, self.charge, streams=streams)


class InferenceTask(Protocol):
    """One parsed request. `Exchange` calls the methods in this order; `EmbeddingsTask` is an example.

    Attributes:
        model: name of the adapter or base model; None if the request has none.
        lora_path: name of the adapter in SGLang's field; None if the request has none.
        ignored: names of the request's unknown fields.
        is_text: whether the answer is text, whose time depends on its length.
    """

    is_text: ClassVar[bool]

    @property
    def model(self) -> str | None: ...
    @property
    def lora_path(self) -> str | None: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        """Check the parameters and return the inputs; None if `prepare` must come first. Blocks.

        Raises:
            InvalidRequest: a parameter or an input is out of range.
        """

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        """Do what `inputs` needs and what takes long. `owner` takes turns with others. Raises RankletError."""

    async def respond(self, call: AdmittedCall) -> Response:
        """Call the replicas, and make the HTTP answer. Raises the errors of `ReplicasClient`."""


ParseTask = Callable[[bytes], InferenceTask]  # parses a body; raises InvalidRequest
