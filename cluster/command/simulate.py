"""`ranklet simulate`: the routing rules side by side on a cluster of any size, without one."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.study import RULES, Study, rate_for
from ranklet.routing.simulate.traffic import Traffic
from ranklet.routing.simulate.world import Setting

RECOVERED = 2.0  # times the steady p99
_HEADS = {
    "hit rate": "hits", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "mean_ms": "mean ms", "loads_per_s": "loads/s",
    "busiest / mean": "busiest", "steady_p99_ms": "steady p99", "worst_p99_ms": "worst p99",
    "recovered_s": "recovered s",
}  # fmt: skip


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser("simulate", help="routing rules side by side on a simulated cluster of any size")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64, help="of each replica (default: %(default)s)")
    parser.add_argument("--gateways", type=int, default=8)
    parser.add_argument("--zipf", type=float, default=1.1, help="exponent; 0 is uniform (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=6000, help="mean of a prompt (default: %(default)s)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, help="requests a second")
    rate.add_argument("--load", type=float, default=0.7, help="share of what the replicas can do (default: 0.7)")
    parser.add_argument("--seconds", type=float, default=30.0, help="simulated (default: %(default)s)")
    parser.add_argument("--warm-s", type=float, help="not counted, from the start (default: half of it)")
    parser.add_argument("--flash-s", type=float, help="when a quiet adapter starts to get 30 %% of the traffic")
    parser.add_argument("--lose", type=float, nargs=2, metavar=("SECOND", "COUNT"), help="replicas that die")
    parser.add_argument("--join", type=float, nargs=2, metavar=("SECOND", "COUNT"), help="replicas that come then")
    parser.add_argument("--late-s", type=float, default=0.0, help="how late gateways hear of replicas")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES)[:5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.set_defaults(run=_run)


def study(asked: argparse.Namespace) -> Study:
    """What was asked for.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("replicas", "adapters", "slots", "gateways", "tokens", "workers"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(asked, name)}")
    for name in ("seconds", "load") if asked.rate is None else ("seconds", "rate"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"--{name}: expected more than 0, got {getattr(asked, name)}")
    setting = Setting(
        replicas=asked.replicas + (int(asked.join[1]) if asked.join else 0),
        slots=asked.slots,
        gateways=asked.gateways,
        lose=_ranks(asked.lose, 0, asked.replicas),
        join=_ranks(asked.join, asked.replicas, None),
        late_s=asked.late_s,
        warm_s=asked.seconds / 2 if asked.warm_s is None else asked.warm_s,
    )
    if not 0 <= setting.warm_s < asked.seconds:
        raise ValueError(f"--warm-s: expected 0 or more and less than --seconds, got {setting.warm_s:g}")
    at_first = rate_for(asked.load, setting, asked.tokens) * asked.replicas / setting.replicas
    traffic = Traffic(
        asked.rate or at_first, asked.adapters, asked.zipf, asked.tokens, asked.seconds, asked.flash_s, seed=asked.seed
    )
    return Study(setting, traffic)


def _ranks(given: list[float] | None, first: int, most: int | None) -> tuple[float, tuple[int, ...]] | None:
    if given is None:
        return None
    count = int(given[1])
    if most is not None and not 0 < count < most:
        raise ValueError(f"--lose: expected 1 to {most - 1} replicas, got {count}")
    return given[0], tuple(range(first, first + count))


def summary(outcome: SimulationResult, flash_s: float | None) -> dict[str, Any]:
    """An outcome's row; of a flash crowd, also how long its waits stayed long."""
    row = outcome.row()
    if flash_s is not None:
        row |= flash(outcome, flash_s)
    return row


def flash(outcome: SimulationResult, flash_s: float) -> dict[str, Any]:
    """The p99 before, the worst second's after, and the seconds until it stays below twice the one before."""
    seconds = outcome.by_second()
    before = [p99 for second, p99, _ in seconds if outcome.warm_s <= second < int(flash_s)]
    steady_s = sorted(before)[len(before) // 2]
    after = [(second, p99) for second, p99, _ in seconds if second >= int(flash_s)]
    late = [second for second, p99 in after if p99 > RECOVERED * steady_s]
    return {
        "steady_p99_ms": steady_s * 1e3, "worst_p99_ms": max(p99 for _, p99 in after) * 1e3,
        "recovered_s": max(late) + 1 - flash_s if late else 0.0,
    }  # fmt: skip


def _run(asked: argparse.Namespace) -> int:
    chosen = study(asked)
    rows: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rules", total=len(asked.rules))
        for outcome in chosen.run_all(asked.rules, asked.workers):
            rows[outcome.rule] = summary(outcome, asked.flash_s)
            progress.advance(task)
    ordered = [rows[name] for name in asked.rules]
    rate = chosen.traffic.rate
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{chosen.setting.replicas} replicas, {asked.adapters} adapters, {rate:,.0f} requests/s",
    )
    shown = [name for name in ordered[0] if name == "rule" or any(row[name] for row in ordered)]
    for name in shown:
        table.add_column(_HEADS.get(name, name), justify="left" if name == "rule" else "right", no_wrap=name == "rule")
    for row in ordered:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in shown))
    Console().print(table)
    if asked.out:
        settings = {name: str(value) for name, value in vars(asked).items() if name != "run"}
        asked.out.write_text(json.dumps({"asked": settings, "rows": ordered}, indent=1))
    return 0
