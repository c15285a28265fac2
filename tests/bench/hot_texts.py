"""Texts of 64 adapters that saturate an engine, on a simulated device.

They are requested evenly, mostly from one adapter, or with a long system prompt of each adapter. As many requests are
in flight as texts run at once, or more, each followed by another. With Zipf's exponent of 2, one adapter gets 61 % of
the requests, as in `text_cluster`. The device is that of `fair_texts`, whose times are of steps only.
"""

import random
from typing import Any, NamedTuple

import numpy as np

from tests.bench import report
from tests.bench.fair_texts import Kind, Run, Timed, h200_costs

_ADAPTERS = 64
_ROWS = 256  # texts that run at once


class Requested(NamedTuple):
    """Requests of one kind.

    Attributes:
        exponent: of Zipf's law, by which adapters are drawn.
        in_flight: number of requests.
        gathers: whether texts that wait for rows start together.
    """

    name: str
    exponent: float
    kind: Kind
    in_flight: int = _ROWS
    gathers: bool = True


WORKS = (
    Requested("evenly", 0.0, Kind(512, 256)),
    Requested("mostly from one", 2.0, Kind(512, 256)),
    Requested("with system prompts", 1.0, Kind(32, 64, system=2000)),
    *(
        Requested(f"prompts of {prompt} tokens", 0.0, Kind(prompt, 256), 320, gathers)
        for prompt in (512, 64)
        for gathers in (False, True)
    ),
)


def measure(work: Requested, requests: int) -> dict[str, Any]:
    costs, unit_s = h200_costs()
    run = Run(costs, _ROWS, unit_s, adapters=_ADAPTERS, has_prefix_cache=work.kind.system > 0, gathers=work.gathers)
    weights = [1 / rank**work.exponent for rank in range(1, _ADAPTERS + 1)]
    left = random.Random(2).choices(range(_ADAPTERS), weights, k=requests)
    ended: list[Timed] = []
    running: list[int] = []

    def again(timed: Timed | None = None) -> None:
        if timed is not None:
            ended.append(timed)
        if left:
            run.send(work.kind, left.pop(), again)

    for _ in range(work.in_flight):
        again()
    while len(ended) < requests:
        run.until(run.now_s + 0.5)
        if left:
            running.append(len(run.engine.scheduler.holders))
    waits_ms = [1e3 * (each.first_s - each.due_s) for each in ended]
    return {
        "work": work.name, "in flight": work.in_flight, "start together": "yes" if work.gathers else "no",
        "requests from one adapter": weights[0] / sum(weights), "requests": requests,
        "tokens_per_s": sum(each.tokens for each in ended) / max(each.end_s for each in ended),
        "first_p50_ms": float(np.percentile(waits_ms, 50)), "first_p99_ms": float(np.percentile(waits_ms, 99)),
        "gap_p50_ms": 1e3 * float(np.percentile([gap for each in ended for gap in each.gaps], 50)),
        "running": float(np.mean(running)),
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "hot-texts-simulated")
    parser.add_argument("--requests", type=int, default=2048)
    options = parser.parse_args()
    rows = [measure(work, options.requests) for work in WORKS]
    for row, work in zip(rows, WORKS, strict=True):
        is_alike = (work.kind, work.in_flight) == (WORKS[0].kind, WORKS[0].in_flight)
        row["rate ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"] if is_alike else ""
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
