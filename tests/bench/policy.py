"""CPU time of one routing decision, with reporting replicas, Zipf-distributed adapters and requests in flight."""

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Fleet, Member
from ranklet.routing.report import Holdings, QueueLoad, StateReport
from tests.bench import report

_CHOICES = 20_000
_SLOTS = 64
_IN_FLIGHT = 200
_RATE = 300_000.0


def row(replicas: int, adapters: int) -> dict[str, Any]:
    """Time `choose`, and the bookkeeping of one request and one report."""
    now_s, fleet, names = 0.0, Fleet(), [f"adapter-{i}" for i in range(adapters)]
    affinity = Affinity(fleet=fleet, clock=lambda: now_s)
    affinity.set_members([Member(f"r{i}", i) for i in range(replicas)])
    for i in range(replicas):
        held = frozenset(names[(i * _SLOTS + k) % adapters] for k in range(_SLOTS))
        holdings = Holdings(0, held, frozenset(), frozenset(), _SLOTS, len(held), 64)
        affinity.on_report(StateReport(f"r{i}", QueueLoad(0, 0, _RATE, 0, 0), holdings, ("me", "you")), "me")
    weights = np.arange(1, adapters + 1) ** -1.1
    drawn = np.random.default_rng(0).choice(adapters, _CHOICES, p=weights / weights.sum()).tolist()
    choose_s, rest_s = [], []
    for k, which in enumerate(drawn):
        now_s = k / 5000
        began_s = perf_counter()
        choice = affinity.choose(names[which], 512)
        chosen_s = perf_counter()
        fleet.add_request(k, choice.order[0], 512, now_s)
        fleet.complete_request(k - _IN_FLIGHT)
        fleet.update_load(f"r{choice.order[0]}", QueueLoad(k, 1000, _RATE, k, 512 * k), now_s)
        rest_s.append(perf_counter() - chosen_s)
        choose_s.append(chosen_s - began_s)
    choose_us, rest_us = np.array(choose_s[_CHOICES // 2 :]) * 1e6, np.array(rest_s[_CHOICES // 2 :]) * 1e6
    return {
        "replicas": replicas, "adapters": adapters, "choose_us": float(choose_us.mean()),
        "choose_p50_us": median(choose_us), "choose_p99_us": float(np.percentile(choose_us, 99)),
        "sent_answered_heard_us": float(rest_us.mean()),
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__)
    options = parser.parse_args()
    rows = [row(replicas, adapters) for replicas, adapters in ((4, 256), (64, 1000), (1000, 1000), (1000, 10_000))]
    report.save("policy", rows, options.out)


if __name__ == "__main__":
    main()
