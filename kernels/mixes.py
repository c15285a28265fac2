"""Which adapter each request asks for: the mixes of punica's paper, one definition for tests, tuner and benchmarks.

distinct: each request another adapter; uniform: drawn evenly; skewed: few adapters take most (Zipf, exponent 1.5);
identical: one adapter for all; zipf:ALPHA: skewed with another exponent. Imports no torch: load clients use it too.
"""

import random
from typing import Literal, get_args

Mix = Literal["distinct", "uniform", "skewed", "identical"]
MIXES: tuple[Mix, ...] = get_args(Mix)
_SKEWED = 1.5


def assign(mix: str, requests: int, adapters: int, *, seed: int = 0) -> list[int]:
    """The adapter, from 0, of each request; "distinct" begins again at 0 when there are too few adapters.

    Raises:
        ValueError: no such mix.
    """
    if mix == "distinct":
        return [request % adapters for request in range(requests)]
    if mix == "identical":
        return [0] * requests
    alpha = exponent(mix)
    weights = [(rank + 1) ** -alpha for rank in range(adapters)]
    return random.Random(seed).choices(range(adapters), weights, k=requests)


def exponent(mix: str) -> float:
    """How much more the first adapter is asked for than the next; 0: equally.

    Raises:
        ValueError: `mix` is not drawn at random, or says no number.
    """
    name, _, alpha = mix.partition(":")
    if name == "zipf":
        try:
            found = float(alpha)
        except ValueError:
            found = -1.0
        if 0 <= found < float("inf"):
            return found
    drawn = {"uniform": 0.0, "skewed": _SKEWED}
    if mix not in drawn:
        raise ValueError(f"expected {', '.join(MIXES)} or zipf:ALPHA (such as zipf:1.1), got {mix!r}")
    return drawn[mix]
