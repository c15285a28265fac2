"""Mixes: which adapter each request uses, as in Punica's paper, for tests, tuner and benchmarks.

- distinct: each request uses another adapter.
- uniform: adapters are drawn with equal probability.
- skewed: adapters are drawn by Zipf's law with exponent 1.5. Few adapters get most requests.
- identical: all requests use one adapter.
- zipf:ALPHA: adapters are drawn by Zipf's law with exponent ALPHA.

This module imports no torch, because load clients use it too.
"""

import random
from typing import Literal, get_args

Mix = Literal["distinct", "uniform", "skewed", "identical"]
MIXES: tuple[Mix, ...] = get_args(Mix)
_SKEWED = 1.5


def assign(mix: str, requests: int, adapters: int, *, seed: int = 0) -> list[int]:
    """Return the adapter of each request, counted from 0. "distinct" starts over after the last adapter.

    Raises:
        ValueError: the mix is unknown.
    """
    if mix == "distinct":
        return [request % adapters for request in range(requests)]
    if mix == "identical":
        return [0] * requests
    alpha = exponent(mix)
    weights = [(rank + 1) ** -alpha for rank in range(adapters)]
    return random.Random(seed).choices(range(adapters), weights, k=requests)


def exponent(mix: str) -> float:
    """Return the exponent of a mix that is drawn by Zipf's law; 0 is uniform.

    Raises:
        ValueError: the mix is unknown or not drawn at random, or its exponent is not a finite number >= 0.
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
