"""From a request's body to prompts for one adapter. Blocking; gateways run it on a thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.protocol import EmbeddingsRequest, parse_input, parse_request
from ranklet.replicas.engine.limits import RequestLimits


class Tokenizer(Protocol):
    """What the intake needs of `ranklet.replicas.model.tokenizer.PromptTokenizer`."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...


@dataclass(frozen=True)
class Intake:
    """A request, understood."""

    request: EmbeddingsRequest
    adapter: AdapterLocation | None  # None: the base model
    prompts: list[NDArray[np.int32]]  # int32 [length] each

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))


def take_in(body: bytes, names: ModelNames, tokenizer: Tokenizer, max_texts: int, limits: RequestLimits) -> Intake:
    """Parse, resolve the model's name, tokenise, check.

    Raises:
        RankletError: InvalidRequest, UnknownModel, AdapterNotFound or InvalidAdapter, as each step says.
    """
    request = parse_request(body)
    adapter = names.resolve(request.model, request.lora_path)
    entries = parse_input(request.input, max_texts)
    prompts = tokenizer.encode(entries) if isinstance(entries[0], str) else entries
    # The engine checks too, but of a request that is split it sees the parts, so its indices would mislead.
    limits.check_prompts(prompts)
    limits.check_dimensions(request.dimensions)
    return Intake(request, adapter, prompts)
