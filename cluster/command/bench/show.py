"""A run's numbers as a table and as a plot."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ranklet.cluster.command.bench.result import PERCENTILES, BenchResult, Latencies
from ranklet.cluster.command.bench.text_show import print_text_notes, text_columns, text_row
from ranklet.cluster.command.console import plain

_MAX_ROWS = 20
_COLUMNS = ("requests", "failed", "req/s", "texts/s", "tokens/s", "mean ms", *(f"p{p}" for p in PERCENTILES))
_BINS = 100
_PICTURES = (".png", ".svg", ".pdf")


def print_result(result: BenchResult, console: Console) -> None:
    table = Table(title=f"{result.overall.answered:,} of {result.planned:,} requests in {result.seconds:.2f} s")
    table.add_column("")
    if result.overall.text:
        text_columns(table)
    else:
        for column in _COLUMNS:
            table.add_column(column, justify="right")
    row = text_row if result.overall.text else _row
    table.add_row("all", *row(result.overall), style="bold", end_section=True)
    busiest = sorted(result.by_adapter.items(), key=lambda item: -item[1].requests)
    if len(busiest) > 1:
        for name, numbers in busiest[:_MAX_ROWS]:
            table.add_row(plain(name), *row(numbers))
        if len(busiest) > _MAX_ROWS:
            table.add_row(f"... {len(busiest) - _MAX_ROWS} more")
    console.print(table)
    if result.overall.text:
        print_text_notes(result, console)
    for code, count in result.overall.errors.items():
        console.print(plain(f"{count} x {code}"), style="red")
    unsent = result.planned - result.overall.requests
    if unsent:
        console.print(f"[yellow]interrupted: {unsent:,} requests were not sent or not answered")
    client = result.client
    shares = ", ".join(f"{share:.0%}" for share in client.cpu_shares)
    per_frame = f", {client.cpu_us_per_frame:.1f} us per frame" if client.cpu_us_per_frame else ""
    console.print(
        f"client: {client.processes} process{'es' if client.processes > 1 else ''} used {shares} of a core, "
        f"{client.cpu_ms_per_request:.2f} ms per request{per_frame}"
    )
    console.print(f"  answers waited for the client: p99 {client.p99_lag_ms:.1f} ms, max {client.max_lag_ms:.1f} ms")
    if client.mean_late_ms is not None:
        console.print(
            f"  requests were sent {client.mean_late_ms:.1f} ms late on average, p99 {client.p99_late_ms:.1f} ms, "
            f"max {client.max_late_ms:.1f} ms"
        )
    if client.suspicion:
        console.print(f"[yellow]the client may be the bottleneck: {client.suspicion}")


def _row(numbers: Latencies) -> tuple[str, ...]:
    latencies = (numbers.mean_ms, *(getattr(numbers, f"p{p}_ms") for p in PERCENTILES))
    return (
        f"{numbers.requests:,}", f"{numbers.requests - numbers.answered:,}", f"{numbers.requests_per_s:,.1f}",
        f"{numbers.prompts_per_s:,.1f}", f"{numbers.tokens_per_s:,.0f}",
        *(f"{ms:,.1f}" if math.isfinite(ms) else "-" for ms in latencies),
    )  # fmt: skip


def check_plot_path(path: Path) -> None:
    """Check before a run that its plot can be written.

    Raises:
        ValueError: matplotlib is not installed, or the path does not end with a picture format.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("--plot: expected matplotlib, which is not installed: pip install 'ranklet[plot]'")
    if path.suffix not in _PICTURES:
        raise ValueError(f"--plot: expected a path that ends with {', '.join(_PICTURES)}; got {path}")


def plot_result(result: BenchResult, path: Path) -> None:
    """Plot the distribution of latencies, and tokens per second over the run."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    waits = np.sort(result.answers[:, 1]) * 1e3
    left.plot(waits, np.arange(1, len(waits) + 1) / max(len(waits), 1))
    left.set(xlabel="latency, ms", ylabel="share of answers", ylim=(0, 1.02), title="latency")
    for percentile in (50, 99):
        if len(waits):
            left.axvline(float(np.percentile(waits, percentile)), ls=":", lw=0.8, color="grey")
    sums, edges = np.histogram(result.answers[:, 0], _BINS, (0, result.seconds), weights=result.tokens)
    right.stairs(sums / np.diff(edges), edges, fill=True, alpha=0.5)
    text = result.overall.text
    rate = text.output_tokens_per_s if text else result.overall.tokens_per_s
    right.axhline(rate, ls=":", color="black")
    right.set(xlabel="seconds", ylabel="tokens answered per second", title=f"{rate:,.0f} tokens/s")
    figure.savefig(path)
