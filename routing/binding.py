"""Hands the gateway's `Affinity` and `Counters` to the router in the same process."""

from typing import NamedTuple

from ranklet.routing.affinity import Affinity
from ranklet.routing.counters import Counters


class RouterBinding(NamedTuple):
    """The objects that a gateway shares with its router."""

    affinity: Affinity
    counters: Counters


# Ray creates the router itself, from the path of its class and JSON arguments, so that no object can be passed to it.
# Only the gateway's constructor calls `bind`, and only `AdapterRouter.initialize_state` calls `get_binding`.
_bindings: list[RouterBinding] = []


def bind(affinity: Affinity, counters: Counters) -> None:
    """Set the objects for routers that are created in this process from now on."""
    _bindings[:] = [RouterBinding(affinity, counters)]


def get_binding() -> RouterBinding:
    """Return the objects of the last `bind`, or new ones in a process without a gateway."""
    return _bindings[0] if _bindings else RouterBinding(Affinity(), Counters())
