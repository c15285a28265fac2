"""Batches with a given mix of adapters, for tests, tuner and benchmarks."""

from dataclasses import dataclass

from ranklet.kernels.batch import LoraBatch, plan
from ranklet.kernels.mixes import Mix, assign


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of requests of one length."""

    mix: Mix
    requests: int
    length_tokens: int
    adapters: int

    def batch(self) -> LoraBatch:
        return plan([self.length_tokens] * self.requests, assign(self.mix, self.requests, self.adapters))[1]


def even(rows: int, adapters: int) -> LoraBatch:
    """Plan a batch of rows shared evenly among adapters, with adapter i in slot i. Requires rows >= adapters."""
    return plan([rows // adapters + (i < rows % adapters) for i in range(adapters)], list(range(adapters)))[1]
