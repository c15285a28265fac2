"""Compare routing rules on simulated clusters.

Parts: steady traffic, a flash crowd, lost and added replicas, uniform traffic, stale views, conversations, and these
with little memory, many gateways and late reports.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console

from ranklet.cluster.command import simulate
from ranklet.routing.simulate.outcome import SimulationResult
from tests.bench import report

_ALL = ["ranklet", "power of two", "Ray multiplex", "consistent hash", "round robin"]
_EVEN = ["ranklet", "least seen", "least loaded", "power of two"]
PARTS: dict[str, Callable[[int], list[tuple[str, list[str]]]]] = {
    "steady": lambda n: [("steady", _big(n, 24, _ALL))],
    "flash": lambda n: [("flash crowd", [*_big(n, 30, _ALL[:3]), "--flash-s", "14", "--warm-s", "10"])],
    "faults": lambda n: [
        ("10 % of replicas lost", [*_big(n, 24, _ALL[:3]), "--lose", "14", str(n // 10)]),
        ("25 % more replicas", [*_big(n, 24, _ALL[:3]), "--join", "14", str(n // 4)]),
    ],
    "uniform": lambda n: [
        (f"uniform, {size} x {adapters}", _even(size, adapters))
        for size, adapters in ((4, 32), (4, 200), (64, 32), (64, 640))
    ],
    "stale": lambda n: [
        (f"{gateways} gateways, {late_s:g} s late", _late(gateways, late_s))
        for gateways in (8, 32)
        for late_s in (0.0, 0.5, 5.0)
    ],
    "text": lambda n: [("conversations", _text(n))],
    "text-stress": lambda n: [
        ("150,000 tokens of keys and values", _text(n, "--kv-tokens", "150000")),
        ("32 gateways", _text(n, "--gateways", "32", "--rules", "ranklet", "adapter only")),
    ],
    "text-late": lambda n: [
        (f"reports {late} s late", _text(n, "--late-s", late, "--rules", "ranklet", "adapter only"))
        for late in ("0.1", "0.5", "1", "2", "5", "10")
    ],
}


def _big(replicas: int, seconds: int, rules: list[str]) -> list[str]:
    shape = ["--replicas", str(replicas), "--adapters", str(10 * replicas), "--seconds", str(seconds)]
    return [*shape, "--rules", *rules]


def _even(replicas: int, adapters: int) -> list[str]:
    seconds = str(3000 // replicas)
    shape = ["--replicas", str(replicas), "--adapters", str(adapters), "--zipf", "0", "--seconds", seconds]
    return [*shape, "--rules", *_EVEN]


def _late(gateways: int, late_s: float) -> list[str]:
    shape = ["--replicas", "100", "--adapters", "1000", "--seconds", "16", "--rules", "ranklet"]
    return [*shape, "--gateways", str(gateways), "--late-s", str(late_s)]


def _text(replicas: int, *more: str) -> list[str]:
    shape = ["--text", "--replicas", str(replicas), "--adapters", str(10 * replicas)]
    return [*shape, "--pause-s", "2", "--seconds", "25", *more]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--replicas", type=int, default=1000, help="number of replicas")
    parser.add_argument("--seeds", type=int, default=1, help="runs with other traffic; of each number, the median")
    options = parser.parse_args()
    console = Console(stderr=True)
    command = argparse.ArgumentParser()
    simulate.add(command.add_subparsers())
    for part in options.parts:
        rows: list[dict[str, Any]] = []
        drawn: dict[str, list[SimulationResult]] = {}
        for label, words in PARTS[part](options.replicas):
            summaries: dict[str, list[dict[str, Any]]] = {}
            for seed in range(options.seeds):
                arguments = command.parse_args(["simulate", *words, "--seed", str(seed)])
                names = simulate.rule_names(arguments)
                began = perf_counter()
                found = {each.rule: each for each in simulate.study(arguments).run_all(names, arguments.workers)}
                console.print(f"{label}, seed {seed}: {perf_counter() - began:.0f} s")
                drawn.setdefault(label, [found[name] for name in names])
                for name in names:
                    summaries.setdefault(name, []).append(simulate.summary(found[name], arguments.flash_s))
            rows += [{"case": label, **medians(each)} for each in summaries.values()]
        path = report.save(f"simulate-{part}", rows, options.out)
        if part in ("steady", "flash", "faults"):
            picture(drawn, path.with_suffix(".png"))


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over the seeds, and the worst p99 of the first token."""
    found = {name: value if name == "rule" else median(row[name] for row in rows) for name, value in rows[0].items()}
    if "first_p99_ms" in found and len(rows) > 1:
        found["first_p99_worst_ms"] = max(row["first_p99_ms"] for row in rows)
    return found


def picture(cases: dict[str, list[SimulationResult]], path: Path) -> None:
    """Draw the p99 wait of each second: one panel for each case, one line for each rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(cases), figsize=(8 * len(cases), 4.5), squeeze=False, layout="constrained")
    for panel, (label, outcomes) in zip(panels[0], cases.items(), strict=True):
        for outcome in outcomes:
            seconds = outcome.by_second()
            panel.plot([s for s, _, _ in seconds], [p99 * 1e3 for _, p99, _ in seconds], label=outcome.rule)
        panel.set(title=label, xlabel="second", ylabel="p99 wait of that second's requests, ms", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
