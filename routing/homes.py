"""The traffic of all adapters, and how much of it one home takes. Callers pass the time."""

import math
from collections import OrderedDict

import numpy as np

from ranklet.routing.demand import Demand
from ranklet.routing.fleet import Fleet, Vector
from ranklet.routing.policy import Policy

_MAX_DEMANDS = 65_536  # adapters whose traffic is remembered
_TIGHT_FROM, _TIGHT_TO = 0.5, 0.9  # share of all slots needed by one home each, where tightness goes from 0 to 1
_MAX_HOMES_PER_SLOT = 0.5


class HomeSize:
    """Sets the work per second of one home: the smallest that leaves enough slots for the homes of all adapters.

    Attributes:
        work_per_s: of one home.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.work_per_s = 1.0
        self._fleet = fleet
        self._demands: OrderedDict[str, Demand] = OrderedDict()

    def demand(self, adapter: str) -> Demand:
        found = self._demands.get(adapter)
        if found is None:
            found = self._demands[adapter] = Demand()
            if len(self._demands) > _MAX_DEMANDS:
                self._demands.popitem(last=False)
        else:
            self._demands.move_to_end(adapter)
        return found

    def update(self, policy: Policy, now_s: float) -> float:
        """Set the size of a home. Returns how nearly the adapters need all slots of all replicas, from 0 to 1."""
        fleet = self._fleet
        rate = fleet.mean_rate / fleet.gateways  # this router sees one part of the traffic
        active = [each for each in self._demands.values() if each.is_active(now_s)]
        replicas_needed = np.array([each.work_per_s(now_s) for each in active]) / rate
        unseen = max(len(fleet.placement) - len(active), 0)  # adapters that only other routers have requests for
        slots = float(fleet.slots.sum()) or math.inf
        load, max_load = policy.max_load_per_home, policy.max_load_per_home_if_tight
        while _homes(replicas_needed, load) + unseen > _MAX_HOMES_PER_SLOT * slots and load < max_load:
            load = min(load * 1.25, max_load)
        needed = (_homes(replicas_needed, max_load) + unseen) / slots
        self.work_per_s = load * rate
        return round(min(max((needed - _TIGHT_FROM) / (_TIGHT_TO - _TIGHT_FROM), 0.0), 1.0), 1)


def _homes(replicas_needed: Vector, load: float) -> float:
    return float(np.maximum(np.ceil(replicas_needed / load), 1).sum())
