"""`ranklet simulate`: compares routing rules on a simulated cluster of any size."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ranklet.cluster.command.console import open_console
from ranklet.replicas.adapters.reference import RECENTLY_USED_S
from ranklet.routing.simulate.conversations import TextTraffic
from ranklet.routing.simulate.engine import Speed
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.simulator import SimulatedCluster
from ranklet.routing.simulate.study import RULES, TEXT_RULES, Study, rate_for, text_rate_for
from ranklet.routing.simulate.text_engine import TextSpeed
from ranklet.routing.simulate.traffic import Traffic

_RECOVERED_FACTOR = 2.0  # times the p99 before the flash crowd
_TEXT_OPTIONS = ("system_tokens", "question_tokens", "answer_tokens", "turns", "kv_tokens")
_HEADINGS = {
    "hit rate": "hits", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "mean_ms": "mean ms", "loads_per_s": "loads/s",
    "busiest / mean": "busiest", "steady_p99_ms": "steady p99", "worst_p99_ms": "worst p99",
    "recovered_s": "recovered s", "first_p50_ms": "first p50 ms", "first_p99_ms": "first p99 ms",
    "gap_p50_ms": "gap p50 ms", "gap_p99_ms": "gap p99 ms", "goodput_per_s": "goodput/s",
}  # fmt: skip


def add(commands: Any) -> None:
    parser = commands.add_parser("simulate", help="compare routing rules on a simulated cluster of any size")
    parser.add_argument("--replicas", type=int, default=64, help="number of replicas (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=1000, help="number of adapters (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=64, help="adapter slots of each replica (default: %(default)s)")
    parser.add_argument("--gateways", type=int, default=8, help="number of gateways (default: %(default)s)")
    parser.add_argument("--zipf", type=float, default=1.1, help="exponent of adapters' shares (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=6000, help="mean length of a prompt (default: %(default)s)")
    _add_text(parser)
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, help="requests per second")
    rate.add_argument("--load", type=float, default=0.7, help="share of the replicas' capacity (default: 0.7)")
    parser.add_argument("--seconds", type=float, default=30.0, help="simulated time (default: %(default)s)")
    parser.add_argument(
        "--warm-s", type=float, help="start of the measurement (default: half of the time; with --text 0.6)"
    )
    parser.add_argument("--flash-s", type=float, help="time at which a quiet adapter gets 30 %% of the traffic")
    parser.add_argument(
        "--lose", type=float, nargs=2, metavar=("SECOND", "COUNT"), help="when replicas die, and how many"
    )
    parser.add_argument(
        "--join", type=float, nargs=2, metavar=("SECOND", "COUNT"), help="when replicas start, and how many"
    )
    parser.add_argument("--late-s", type=float, default=0.0, help="additional delay of the replicas' reports")
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=tuple(dict.fromkeys((*RULES, *TEXT_RULES))),
        metavar="RULE",
        help=f"routing rules to compare, from: {', '.join(RULES)}; with --text from: {', '.join(TEXT_RULES)} "
        "(default: the first five)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the traffic (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes; each simulates one rule at a time (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers to this file")
    parser.set_defaults(run=_run)


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("texts")
    text.add_argument("--text", action="store_true", help="simulate conversations instead of embeddings")
    for name, default, about in (
        ("system", 1500, "tokens of a system prompt"),
        ("question", 150, "mean tokens of a question"),
        ("answer", 200, "mean tokens of an answer"),
        ("kv", 1_000_000, "tokens that a replica keeps keys and values of"),
    ):
        text.add_argument(f"--{name}-tokens", type=int, default=default, help=f"{about} (default: %(default)s)")
    text.add_argument("--turns", type=float, default=4.0, help="mean turns of a conversation (default: %(default)s)")
    text.add_argument(
        "--pause-s",
        type=float,
        default=4.0,
        help="mean time from an answer to the next question (default: %(default)s)",
    )


def rule_names(options: argparse.Namespace) -> list[str]:
    """Return the rules to compare. Raises ValueError if one is not for this traffic."""
    known = TEXT_RULES if options.text else RULES
    for name in options.rules or ():
        if name not in known:
            with_text = "with" if options.text else "without"
            raise ValueError(f"--rules: expected some of {', '.join(known)} {with_text} --text, got {name}")
    return options.rules or list(known)[:5]


def study(options: argparse.Namespace) -> Study:
    """Return the study that the arguments describe.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("replicas", "adapters", "slots", "gateways", "tokens", "workers", *_TEXT_OPTIONS):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.text and (options.flash_s is not None or options.lose or options.join):
        raise ValueError("--text: expected no --flash-s, --lose or --join beside it")
    for name in ("seconds", "pause_s", "load" if options.rate is None else "rate"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(options, name)}")
    speed = TextSpeed(kv_tokens=options.kv_tokens)
    cluster = SimulatedCluster(
        replicas=options.replicas + (int(options.join[1]) if options.join else 0),
        recently_used_s=RECENTLY_USED_S,
        slots=options.slots,
        gateways=options.gateways,
        speed=speed if options.text else Speed(),
        lose=_ranks(options.lose, 0, options.replicas),
        join=_ranks(options.join, options.replicas, None),
        late_s=options.late_s,
        warm_s=options.seconds * (0.6 if options.text else 0.5) if options.warm_s is None else options.warm_s,
    )
    if not 0 <= cluster.warm_s < options.seconds:
        raise ValueError(f"--warm-s: expected 0 or more and less than --seconds, got {cluster.warm_s:g}")
    if options.flash_s is not None and not cluster.warm_s + 2 <= options.flash_s < options.seconds:
        raise ValueError(
            f"--flash-s: expected at least {cluster.warm_s + 2:g}, 2 s after --warm-s, and less than --seconds; "
            f"got {options.flash_s:g}"
        )
    if options.text:
        texts = TextTraffic(
            options.rate or 1.0, options.adapters, options.zipf, options.seconds, options.system_tokens,
            options.question_tokens, options.answer_tokens, options.turns, options.pause_s, options.seed,
        )  # fmt: skip
        if options.rate is None:
            texts = replace(texts, rate=text_rate_for(options.load, options.replicas, speed, texts))
        return Study(cluster, texts)
    rate = options.rate or rate_for(options.load, cluster, options.tokens) * options.replicas / cluster.replicas
    traffic = Traffic(
        rate, options.adapters, options.zipf, options.tokens, options.seconds, options.flash_s, seed=options.seed
    )
    return Study(cluster, traffic)


def _ranks(given: list[float] | None, first: int, most: int | None) -> tuple[float, tuple[int, ...]] | None:
    if given is None:
        return None
    count = int(given[1])
    if most is not None and not 0 < count < most:
        raise ValueError(f"--lose: expected 1 to {most - 1} replicas, got {count}")
    return given[0], tuple(range(first, first + count))


def summary(outcome: SimulationResult, flash_s: float | None) -> dict[str, Any]:
    """Return the result as one row of a table.

    With a flash crowd, the row also has the median p99 of the seconds before it, the worst p99 after it, and the time
    until no second has a p99 above twice the median.
    """
    return outcome.row() | ({} if flash_s is None else _flash_effect(outcome, flash_s))


def _flash_effect(outcome: SimulationResult, flash_s: float) -> dict[str, Any]:
    seconds = outcome.by_second()
    before = [p99 for second, p99, _ in seconds if outcome.warm_s <= second < int(flash_s)]
    steady_s = sorted(before)[len(before) // 2]
    after = [(second, p99) for second, p99, _ in seconds if second >= int(flash_s)]
    late = [second for second, p99 in after if p99 > _RECOVERED_FACTOR * steady_s]
    return {
        "steady_p99_ms": steady_s * 1e3, "worst_p99_ms": max(p99 for _, p99 in after) * 1e3,
        "recovered_s": max(late) + 1 - flash_s if late else 0.0,
    }  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    chosen, names = study(options), rule_names(options)
    rows: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rules", total=len(names))
        for outcome in chosen.run_all(names, options.workers):
            rows[outcome.rule] = summary(outcome, options.flash_s)
            progress.advance(task)
    ordered = [rows[name] for name in names]
    open_console().print(_table(chosen, ordered))
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "run"}
        options.out.write_text(json.dumps({"asked": settings, "rows": ordered}, indent=1))
    return 0


def _table(chosen: Study, rows: list[dict[str, Any]]) -> Table:
    cluster, traffic = chosen.cluster, chosen.traffic
    title = f"{cluster.replicas} replicas, {traffic.adapters} adapters, {traffic.rate:,.0f} requests/s"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    shown = [name for name in rows[0] if name == "rule" or any(row[name] for row in rows)]
    for name in shown:
        is_rule = name == "rule"
        table.add_column(_HEADINGS.get(name, name), justify="left" if is_rule else "right", no_wrap=is_rule)
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in shown))
    return table
