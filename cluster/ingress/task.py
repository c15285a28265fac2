"""The interface between an inference call's fixed order of steps and the task that the call asks for."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import JoinedAnswer
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.engine.limits import RequestLimits

AnswerT = TypeVar("AnswerT", bound=JoinedAnswer)


class InferenceTask(Protocol[AnswerT]):
    """One parsed request, such as `EmbeddingsTask`. The methods are called in this order.

    Attributes:
        model: name of the adapter or base model; None if the request has none.
        lora_path: name of the adapter in SGLang's field; None if the request has none.
    """

    @property
    def model(self) -> str | None: ...
    @property
    def lora_path(self) -> str | None: ...

    def inputs(self, max_texts: int) -> Texts | TokenIds:
        """Texts or token ids of the prompts. Raises InvalidRequest."""

    def check_params(self, limits: RequestLimits) -> None:
        """Raises InvalidRequest if a parameter is out of range."""

    async def send(
        self,
        replicas: ReplicasClient,
        adapter: AdapterLocation | None,
        prompts: Sequence[NDArray[np.int32]],
        limits: RequestLimits,
    ) -> AnswerT:
        """Have the replicas compute the answer. Raises as `ReplicasClient.infer`."""

    def render(self, answer: AnswerT, model: str) -> bytes:
        """The body of the HTTP answer; `model` is the name of the adapter or base model that computed it."""


ParseTask = Callable[[bytes], InferenceTask[AnswerT]]  # parses a body; raises InvalidRequest
