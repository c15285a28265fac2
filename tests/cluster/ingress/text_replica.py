"""A replica without Ray that answers text calls by a script, and a receiver that keeps the texts."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ranklet.cluster.ingress.text_call import Logprobs
from ranklet.cluster.message import Begun, InferenceCall, InferenceReply, Refusal
from ranklet.cluster.text_result import ChoiceResult, GenerateResult, PackedLogprobs
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import Unavailable
from ranklet.replicas.process.messages import PieceTuple, pack_pieces
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT
from ranklet.routing.report import QueueLoad

PROMPTS = [np.arange(1, 5, dtype=np.int32)]
TEXT = (11, 12, 13, 14, 15)
PARAMS = GenerateParams(max_tokens=5)
Script = Callable[["TextReplica", InferenceCall[GenerateParams]], Coroutine[Any, Any, Any]]


@dataclass
class KeptText:
    """Receives texts; does not want more than `most` tokens of each."""

    most: int = 1000
    end_ids: frozenset[int] = frozenset()
    begun: list[Begun] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)

    def begin(self, begun: Begun) -> None:
        self.begun.append(begun)

    def receive(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> bool:
        known = self.tokens.setdefault(index, [])
        known += tokens
        self.logprobs += logprobs or ()
        return len(known) < self.most


class TextReplica:
    """Stands in for Ray's handle of one replica, r0. `scripts` answer the calls of `generate` one by one.

    Attributes:
        affinity: routes each call, as in Ray's router. None routes none.
    """

    affinity: Affinity | None = None

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.messages: asyncio.Queue[list[bytes] | None] = asyncio.Queue()
        self.calls: list[InferenceCall[GenerateParams]] = []
        self.hints: list[Any] = []
        self.finished: list[tuple[int, int]] = []
        self.opened = 0

    def options(self, *, method_name: str, stream: bool = False) -> "_TextMethod":
        return _TextMethod(self, method_name)

    def send(self, *pieces: PieceTuple) -> None:
        self.messages.put_nowait([pack_pieces(list(pieces))])

    def begin(self, number: int) -> None:
        self.messages.put_nowait([pickle.dumps(Begun(number, "r0", "v1", "gpu", "b1"))])

    def break_feed(self) -> None:
        self.messages.put_nowait(None)


@dataclass
class _TextMethod:
    replica: TextReplica
    name: str

    def remote(self, *arguments: Any, **kwargs: Any) -> Any:
        if self.name == "feed":
            assert arguments == ("gateway", "r0")
            assert kwargs[HINT].only == "r0"
            return FakeFeed(self.replica)
        if self.name == "finish":
            assert kwargs[HINT].only == "r0"
            self.replica.finished += arguments[1]
            return asyncio.sleep(0)
        self.replica.calls.append(arguments[0])
        self.replica.hints.append(kwargs[HINT])
        if self.replica.affinity is not None:
            self.replica.affinity.route(kwargs[HINT])
        return asyncio.ensure_future(self.replica.scripts.pop(0)(self.replica, arguments[0]))


class FakeFeed:
    def __init__(self, replica: TextReplica) -> None:
        self._replica = replica

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        self._replica.opened += 1
        yield []
        while (messages := await self._replica.messages.get()) is not None:
            yield messages

    def cancel(self) -> None:
        pass


def reply(*texts: Sequence[int], logprobs: PackedLogprobs | None = None) -> InferenceReply[GenerateResult]:
    choices = tuple(ChoiceResult(np.array(text, np.int32).tobytes(), "length", None, logprobs) for text in texts)
    return InferenceReply(GenerateResult(choices), 4, "gpu", "native", "r0", "v1", 0.0, 0.0, QueueLoad(1, 0, 0.0, 0, 4))


def failure() -> Refusal:
    """Return the refusal of a call during which the engine's process has ended."""
    return Refusal.of(Unavailable("the engine's process has ended"), "r0", "", None, has_begun=True)
