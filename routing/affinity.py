"""Which replica should answer: rendezvous order over ranks, bounded load, residency. Pure: no Ray, no clock, no state.

An adapter's home is the first rank of its rendezvous order (highest random weight), so every gateway agrees on it
without talking to the others, and a lost replica moves only its own adapters. A home that carries more than `balance`
times the mean load is passed over, as in "Consistent Hashing with Bounded Loads" (Mirrokni and others, 2016),
except that a replica with few requests in flight never is: at low load an adapter stays on one replica.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ranklet.routing.view import ReplicaView

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Policy:
    """How far affinity is followed.

    Raises:
        ValueError: a field is out of range.
    """

    balance: float = 1.25  # a replica may carry this much of the mean load
    free_in_flight: int = 16  # up to here a replica is never passed over, whatever the mean

    def __post_init__(self) -> None:
        if not 1.0 <= self.balance <= 1e6:
            raise ValueError(f"balance: expected a number from 1 to 1e6, got {self.balance}")
        if self.free_in_flight < 1:
            raise ValueError(f"free_in_flight: expected at least 1, got {self.free_in_flight}")

    def bound(self, in_flight: int, replicas: int) -> float:
        """The load at which a replica is passed over, when `in_flight` requests are spread over `replicas`."""
        return max(self.free_in_flight, self.balance * (in_flight + 1) / max(replicas, 1))


def prefer(replicas: Sequence[ReplicaView], adapter: str | None, policy: Policy = Policy(), turn: int = 0) -> list[int]:
    """Indices of all `replicas`, the best first.

    With an adapter: replicas below the load bound come first, among them those that hold the adapter, each group in the
    adapter's rendezvous order; then the overloaded ones, the least loaded first. Without (base model): the least loaded
    first, and `turn` (a running number) says who comes first among equals, so that they share the work.
    Accepts any input: unknown ranks, negative loads, no replicas (an empty list).
    """
    if len(replicas) < 2:
        return list(range(len(replicas)))
    if not adapter:
        return _least_loaded(replicas, turn)
    order = rendezvous(adapter, tuple([replica.rank for replica in replicas]))
    loads = [replica.in_flight for replica in replicas]
    bound = policy.bound(sum(loads), len(loads))
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index in order:
        groups[2 if loads[index] >= bound else adapter not in replicas[index].resident].append(index)
    resident, absent, overloaded = groups
    overloaded.sort(key=loads.__getitem__)
    return resident + absent + overloaded


def _least_loaded(replicas: Sequence[ReplicaView], turn: int) -> list[int]:
    count = len(replicas)
    return sorted(range(count), key=lambda index: (replicas[index].in_flight, (index - turn) % count))


@functools.lru_cache(maxsize=16_384)
def rendezvous(adapter: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Indices into `ranks` by descending weight; the same in every process, and stable when ranks come and go."""
    seed = int.from_bytes(blake2b(adapter.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return tuple(sorted(range(len(ranks)), key=lambda index: (-_mix(seed ^ _mix(ranks[index])), ranks[index], index)))


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
