"""The cost of each replica for an adapter, without the expected wait. Kept until one of its inputs changes."""

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ranklet.routing import rendezvous
from ranklet.routing.fleet import Fleet, Vector
from ranklet.routing.policy import Policy

ORDER_STEP_S = 1e-6  # cost of one place further down an adapter's rendezvous order: equal replicas keep that order
_MAX_BYTES = 128 << 20
_REFRESH_S = 0.05  # between two checks of the inputs that all adapters share


@dataclass(slots=True)
class AdapterCosts:
    """An adapter's costs at every replica, within one membership. Arrays: [replicas].

    Attributes:
        order: place of each replica in the adapter's rendezvous order, from 0.
        homes: number of homes.
        place: place of each replica with holders of the adapter first. The first `homes` places are the homes.
        cost: in seconds.
        wait_factor: factor of the expected wait.
        other: 1 at replicas that this router does not prefer for the adapter, else 0.
        absent: whether the replica has no slot for the adapter.
        version: `CostTable`'s version of the shared inputs when the costs were computed.
        prefetched_s: time of the last choice that led to a load.
    """

    order: NDArray[np.int32]
    homes: int
    place: NDArray[np.int32] = field(init=False)
    cost: Vector = field(init=False)
    wait_factor: Vector = field(init=False)
    other: Vector = field(init=False)
    absent: NDArray[np.bool_] = field(init=False)
    version: int = -1
    prefetched_s: float = -math.inf


class CostTable:
    """The costs of recently used adapters.

    Attributes:
        tight: from 0 to 1, how nearly the adapters need all slots of all replicas.
    """

    def __init__(self, fleet: Fleet, policy: Policy) -> None:
        self._fleet = fleet
        self._policy = policy
        self.tight = 0.0
        self._costs: OrderedDict[str, AdapterCosts] = OrderedDict()
        self._generation = -1
        self._version = 0  # of the inputs that all adapters share
        self._refreshed_s = -math.inf
        self._crowded, self._own_version = np.zeros(0, bool), -1

    def set_policy(self, policy: Policy) -> None:
        self._policy = policy
        self._version += 1

    def set_tight(self, tight: float) -> None:
        self._version += tight != self.tight
        self.tight = tight

    def is_stale(self, now_s: float) -> bool:
        return not 0 <= now_s - self._refreshed_s <= _REFRESH_S or self._generation != self._fleet.generation

    def refresh(self, now_s: float) -> None:
        """Update the inputs that all adapters share: crowded replicas, and the replicas that this router prefers."""
        self._refreshed_s = now_s
        self._drop_old_generation()
        crowded = self._fleet.crowded_replicas()
        if self._own_version != self._fleet.own_version or not np.array_equal(crowded, self._crowded):
            self._own_version, self._crowded = self._fleet.own_version, crowded
            self._version += 1

    def get(self, adapter: str, homes: int) -> AdapterCosts:
        """Return the costs of an adapter with this number of homes, computed if they are missing or outdated."""
        if self._generation != self._fleet.generation:
            self._drop_old_generation()
        costs = self._costs.get(adapter)
        if costs is not None and costs.homes == homes and costs.version == self._version:
            self._costs.move_to_end(adapter)
            return costs
        if costs is None:
            costs = AdapterCosts(_places(rendezvous.order(adapter, self._fleet.salts)), homes)
            if len(self._costs) >= _MAX_BYTES // (len(self._fleet) * 33 + 512):
                self._costs.popitem(last=False)
            self._costs[adapter] = costs
        costs.homes = homes
        self.compute(adapter, costs)
        return costs

    def update(self, adapters: Iterable[str]) -> None:
        self._drop_old_generation()
        for name in self._costs.keys() & adapters:
            self.compute(name, self._costs[name])

    def drop(self, adapters: Iterable[str]) -> None:
        for name in adapters:
            self._costs.pop(name, None)

    def _drop_old_generation(self) -> None:
        if self._generation != self._fleet.generation:
            self._costs.clear()
            self._generation, self._refreshed_s = self._fleet.generation, -math.inf

    def compute(self, adapter: str, costs: AdapterCosts) -> None:
        """Compute the cost of each replica, without its wait.

        The homes are first replicas that hold the adapter, then replicas that are not crowded, each in rendezvous
        order. A copy beyond the homes is used if that saves waiting. Otherwise it gets no requests and is evicted.
        """
        fleet, policy = self._fleet, self._policy
        places = fleet.placement.places(adapter)
        costs.absent = np.ones(len(fleet), bool)
        costs.absent[list(places)] = False
        crowded = costs.absent & self._crowded
        loading = np.zeros(len(fleet), bool)
        loading[[i for i, ready in places.items() if not ready]] = True
        costs.place = _ranks(costs.order + len(fleet) * (loading + np.int32(2) * costs.absent + crowded))
        away = costs.place >= costs.homes
        load_s = fleet.from_disk_s.copy()
        hosts = list(fleet.placement.hosts.get(adapter, ()))
        load_s[hosts] = fleet.from_host_s[hosts]
        others = fleet.preferred_by_others(costs.place, costs.homes) if costs.homes > 1 else False
        later_loads_s = policy.extra_home_loads_if_tight * self.tight * load_s
        if_absent = load_s + policy.eviction_cost_s * crowded + (policy.extra_home_cost_s + later_loads_s) * away
        if_held = (policy.tie_window_s + later_loads_s) * away + load_s / 2 * loading  # about half of the load is done
        cost = np.where(costs.absent, if_absent, if_held)
        costs.cost = cost + ORDER_STEP_S * costs.place + policy.other_router_cost_s * others
        costs.other = (away | others).astype(np.float64)
        costs.wait_factor = 1.0 + policy.away_wait_surcharge * (costs.absent & away).astype(np.float64)
        costs.version = self._version


def _places(order: NDArray[np.intp]) -> NDArray[np.int32]:
    """Return the inverse of a permutation: the place of each index in `order`."""
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order))
    return places


def _ranks(keys: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the rank of each key among all keys, from 0. Keys are distinct."""
    return _places(keys.argsort())
