"""Texts of 64 adapters that saturate an engine, requested evenly or mostly from one of them, on a simulated device.

256 requests are in flight, each followed by another. With Zipf's exponent of 2, one adapter gets 61 % of the requests,
as in `text_cluster`. The device is that of `fair_texts`, whose times are of steps only.
"""

import random
from typing import Any

import numpy as np

from tests.bench import report
from tests.bench.fair_texts import Kind, Run, Timed, h200_costs

_ADAPTERS = 64
_IN_FLIGHT = 256
_KIND = Kind(512, 256)


def measure(exponent: float, requests: int) -> dict[str, Any]:
    costs, unit_s = h200_costs()
    run = Run(costs, _IN_FLIGHT, unit_s, adapters=_ADAPTERS)
    weights = [1 / rank**exponent for rank in range(1, _ADAPTERS + 1)]
    left = random.Random(2).choices(range(_ADAPTERS), weights, k=requests)
    ended: list[Timed] = []
    running: list[int] = []

    def again(timed: Timed | None = None) -> None:
        if timed is not None:
            ended.append(timed)
        if left:
            run.send(_KIND, left.pop(), again)

    for _ in range(_IN_FLIGHT):
        again()
    while len(ended) < requests:
        run.until(run.now_s + 0.5)
        if left:
            running.append(len(run.engine.scheduler.holders))
    return {
        "requests from one adapter": weights[0] / sum(weights), "requests": requests,
        "tokens_per_s": sum(each.tokens for each in ended) / max(each.end_s for each in ended),
        "gap_p50_ms": 1e3 * float(np.percentile([gap for each in ended for gap in each.gaps], 50)),
        "running": float(np.mean(running)),
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "hot-texts-simulated")
    parser.add_argument("--requests", type=int, default=2048)
    options = parser.parse_args()
    rows = [measure(exponent, options.requests) for exponent in (0.0, 2.0)]
    for row in rows:
        row["rate ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
