"""Which adapter each request asks for: the mixes of punica's paper, one definition for tests, tuner and benchmarks.

distinct: each request another adapter; uniform: drawn evenly; skewed: few adapters take most (Zipf, exponent 1.5);
identical: one adapter for all.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

from ranklet.kernels.batch import LoraBatch, plan

Mix = Literal["distinct", "uniform", "skewed", "identical"]
MIXES: tuple[Mix, ...] = get_args(Mix)


def assign(mix: Mix, requests: int, adapters: int, *, seed: int = 0) -> list[int]:
    """The adapter, from 0, of each request; "distinct" begins again at 0 when there are too few adapters."""
    if mix == "distinct":
        return [request % adapters for request in range(requests)]
    if mix == "identical":
        return [0] * requests
    weights = [(rank + 1) ** -1.5 if mix == "skewed" else 1.0 for rank in range(adapters)]
    return random.Random(seed).choices(range(adapters), weights, k=requests)


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of requests of one length."""

    mix: Mix
    requests: int
    length_tokens: int
    adapters: int

    def batch(self) -> LoraBatch:
        """The plan of it, adapter i in slot i."""
        return plan([self.length_tokens] * self.requests, assign(self.mix, self.requests, self.adapters))[1]


def even(rows: int, adapters: int) -> LoraBatch:
    """The plan of `rows` rows shared evenly among adapters, adapter i in slot i; rows >= adapters."""
    return plan([rows // adapters + (i < rows % adapters) for i in range(adapters)], list(range(adapters)))[1]
