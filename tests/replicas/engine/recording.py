"""Types of fixtures, and a listener that keeps the records of an engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import LoadRecord
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.stats import BatchRecord, Listener

MakeEngine = Callable[..., Engine]
Prompts = list[NDArray[np.int32]]
Expected = dict[str | None, NDArray[np.float32]]


@dataclass
class RecordingListener(Listener):
    """Keeps all records of an engine."""

    batches: list[BatchRecord] = field(default_factory=list)
    loads: list[LoadRecord] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    dropped: int = 0

    def batch(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def load(self, record: LoadRecord) -> None:
        self.loads.append(record)

    def evicted(self, adapter: str) -> None:
        self.gone.append(adapter)

    def tier_hit(self, tier: str) -> None:
        self.tiers.append(tier)

    def cancelled(self, prompts: int) -> None:
        self.dropped += prompts
