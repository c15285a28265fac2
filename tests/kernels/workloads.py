"""Which adapter each request asks for: the mixes of punica's paper, one definition for tests, tuner and benchmarks.

distinct: each request another adapter; uniform: drawn evenly; skewed: few adapters take most (Zipf, exponent 1.5);
identical: one adapter for all.
"""

import random
from typing import Literal, get_args

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
