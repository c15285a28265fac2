"""What the router says of its own choices."""

from ranklet.routing.affinity import Policy, prefer, rendezvous
from ranklet.routing.tally import Tally
from ranklet.routing.view import ReplicaView

POLICY = Policy()


def views(loads: list[int], holders: set[int]) -> list[ReplicaView]:
    return [
        ReplicaView(id=str(i), rank=i, in_flight=load, resident=frozenset({"a"} if i in holders else ()))
        for i, load in enumerate(loads)
    ]


def counted(loads: list[int], holders: set[int], chosen: int | None = None) -> Tally:
    tally, seen = Tally(), views(loads, holders)
    tally.count(seen, prefer(seen, "a", POLICY)[0] if chosen is None else chosen, "a", POLICY)
    return tally


def test_choices_are_told_apart() -> None:
    home, other = rendezvous("a", (0, 1))
    idle, busy = [0, 0], [0, 0]
    busy[home] = 100
    assert counted(idle, {home}) == Tally(hits=1)
    assert counted(idle, set()) == Tally(misses=1)
    spilled = counted(idle, {other})
    assert (spilled.hits, spilled.spills) == (1, {"resident": 1})
    spilled = counted(busy, {home})
    assert (spilled.misses, spilled.spills) == (1, {"load": 1})
    assert counted(idle, {home}, chosen=other).spills == {"retry": 1}
