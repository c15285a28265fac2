"""The interface of a task, such as embedding: the steps of an inference call that differ between endpoints."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import JoinedAnswer
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.engine.limits import RequestLimits

AnswerT = TypeVar("AnswerT", bound=JoinedAnswer)


class InferenceTask(Protocol[AnswerT]):
    """One parsed request. `Exchange` calls the methods in this order; `EmbeddingsTask` is an example.

    Attributes:
        model: name of the adapter or base model; None if the request has none.
        lora_path: name of the adapter in SGLang's field; None if the request has none.
    """

    @property
    def model(self) -> str | None: ...
    @property
    def lora_path(self) -> str | None: ...

    def inputs(self, max_texts: int, limits: RequestLimits) -> Texts | TokenIds:
        """Check the parameters and return the texts or token ids of the prompts. Raises InvalidRequest."""

    async def send(
        self, replicas: ReplicasClient, adapter: AdapterLocation | None, prompts: TokenIds, limits: RequestLimits
    ) -> AnswerT:
        """Call the replicas and join their replies. Raises the errors of `ReplicasClient.infer`."""

    def render(self, answer: AnswerT, model: str) -> bytes:
        """Return the body of the HTTP answer. `model` is the name of the adapter or base model that computed it."""


ParseTask = Callable[[bytes], InferenceTask[AnswerT]]  # parses a body; raises InvalidRequest
