"""The interface of an engine, whether it runs in this process or in one of its own. Imports no torch."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, AdapterReport, HeldAdapters
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import Params
from ranklet.replicas.engine.request import Sink
from ranklet.replicas.engine.stats import Snapshot


class SubmittedRequest(Protocol):
    """Methods of `Ticket`, which documents them."""

    def cancel(self) -> None: ...
    def finish(self, index: int) -> None: ...


class QuickCalls(Protocol):
    """Methods that return at once. `Engine` documents them."""

    def pin(self, names: Collection[str]) -> None: ...
    def release(self, name: str, keep: str | None = None) -> bool: ...
    def report(self) -> list[AdapterReport]: ...
    def snapshot(self) -> Snapshot: ...


class EngineApi(QuickCalls, Protocol):
    """Methods of `Engine` and `EngineProcess`. `Engine` documents them."""

    limits: RequestLimits

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def submit(
        self, prompts: Sequence[NDArray[np.int32]], adapter: AdapterRef | None, params: Params, sink: Sink, *,
        given: Sequence[NDArray[np.int32]] = (), key_name: str = "",
    ) -> SubmittedRequest: ...  # fmt: skip
    def load(self, adapter: AdapterRef) -> AdapterInfo: ...
    def prefetch(self, adapter: AdapterRef) -> None: ...
    def held(self) -> HeldAdapters: ...
    def healthy(self) -> bool: ...
    def problem(self) -> str | None: ...


QUICK_CALLS = tuple(name for name, value in vars(QuickCalls).items() if callable(value) and not name.startswith("_"))
