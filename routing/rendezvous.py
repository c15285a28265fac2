"""Rendezvous hashing: an adapter's order of preference over replicas' ranks, the same in every process.

Adding or removing a rank keeps the order of the others (highest random weight, Thaler and Ravishankar 1996).
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def salted(ranks: Sequence[int]) -> NDArray[np.uint64]:
    """Return the hashes of ranks (any integers), the input of `order`: uint64 [ranks]."""
    return mix(np.array([rank & _MASK for rank in ranks], dtype=np.uint64))


def order(adapter: str, salts: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Return the indices of the ranks that `salts` come from, most preferred first."""
    digest = blake2b(adapter.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.argsort(~mix(salts ^ np.frombuffer(digest, "<u8")), kind="stable")


def first(key: int, salts: NDArray[np.uint64], among: NDArray[np.bool_] | None = None) -> int:
    """Return the index of the rank that a key of 64 bits prefers, among all or some."""
    values = mix(salts ^ np.uint64(key))
    return int((values if among is None else values * among).argmax())


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
