"""The numbers of a run for text as a table."""

import math

from rich.console import Console
from rich.table import Table

from ranklet.cluster.command.bench.result import BenchResult, Latencies
from ranklet.cluster.command.console import plain

_LATENCIES = ("first p50", "p99 ms", "gap p50", "p99 ms", "whole p50", "p99 ms")
_COLUMNS = ("requests", "failed", "req/s", "tokens/s", *_LATENCIES)


def text_columns(table: Table) -> None:
    for column in _COLUMNS:
        table.add_column(column, justify="right")


def text_row(numbers: Latencies) -> tuple[str, ...]:
    text = numbers.text
    assert text is not None
    latencies = (text.ttft_p50_ms, text.ttft_p99_ms, text.gap_p50_ms, text.gap_p99_ms, numbers.p50_ms, numbers.p99_ms)
    return (
        f"{numbers.requests:,}", f"{numbers.requests - numbers.answered:,}", f"{numbers.requests_per_s:,.1f}",
        f"{text.output_tokens_per_s:,.0f}", *(f"{ms:,.1f}" if math.isfinite(ms) else "-" for ms in latencies),
    )  # fmt: skip


def print_text_notes(result: BenchResult, console: Console) -> None:
    """Print how tokens were counted, and what the table does not show."""
    text = result.overall.text
    assert text is not None
    frames = text.output_tokens - text.tokens_by_usage
    counted = "by the server" if not frames else f"{text.tokens_by_usage:,} by the server, {frames:,} by frames"
    console.print(
        f"{result.overall.tokens:,} prompt tokens ({text.cached_tokens:,} cached) and {text.output_tokens:,} output "
        f"tokens, counted {counted}"
    )
    if text.gaps:
        console.print(
            f"  {text.gaps:,} gaps, {text.tokens_per_gap:.2f} tokens each, max {text.gap_max_ms:,.1f} ms; "
            f"time per output token p50 {text.tpot_p50_ms:.2f} ms, p99 {text.tpot_p99_ms:.2f} ms"
        )
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in text.finish_reasons.items())
    if reasons:
        console.print(plain(f"  finish reasons: {reasons}"))
    if text.without_done:
        console.print(f"[red]{text.without_done} streams ended without [DONE]", highlight=False, markup=True)
