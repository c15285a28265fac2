"""The numbers of a run: rates, latencies, errors, and the cost of the client itself."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.command.bench.answer import OK
from ranklet.cluster.command.bench.client import ClientLog
from ranklet.cluster.command.bench.text_result import TextNumbers, TextTimes

PERCENTILES = (50, 90, 95, 99)
_MAX_BUSY, _MAX_LATE_MS = 0.8, 10.0  # above these, the client may have been the bottleneck


@dataclass(frozen=True)
class Latencies:
    """Numbers of some of the requests. Rates are per second of the whole run. Latencies are of whole answers."""

    requests: int
    answered: int
    prompts: int  # of answered requests
    tokens: int  # of their prompts, as the server counted them
    requests_per_s: float
    prompts_per_s: float
    tokens_per_s: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    errors: dict[str, int]
    text: TextNumbers | None = None


@dataclass(frozen=True)
class ClientLoad:
    """The load client's own cost."""

    processes: int
    busiest: float  # share of a core that the busiest process used
    cpu_ms_per_request: float
    p99_lag_ms: float  # delay of a process's clock ticks, and so of its answers
    max_lag_ms: float
    mean_late_ms: float | None  # from a request's planned time until it was sent; None in a closed loop
    p99_late_ms: float | None
    max_late_ms: float | None
    cpu_shares: tuple[float, ...] = ()  # share of a core that each process used
    cpu_us_per_frame: float | None = None  # of streamed text

    @property
    def suspicion(self) -> str | None:
        """A reason why the client may have limited the numbers, or None."""
        if self.busiest > _MAX_BUSY:
            return f"a process used {self.busiest:.0%} of a core: raise --processes"
        if self.p99_lag_ms > _MAX_LATE_MS:
            return f"answers waited up to {self.p99_lag_ms:.0f} ms: raise --processes, or use an idle machine"
        if self.p99_late_ms is not None and self.p99_late_ms > _MAX_LATE_MS:
            return f"requests were sent up to {self.p99_late_ms:.0f} ms late: raise --processes, or use an idle machine"
        return None


@dataclass(frozen=True)
class BenchResult:
    """All numbers of a run."""

    planned: int  # requests; more than `overall.requests` if the run was interrupted
    seconds: float  # from the first request sent to the last answer
    overall: Latencies
    by_adapter: dict[str, Latencies]
    client: ClientLoad
    answers: NDArray[np.float64]  # [answered, 2]: seconds after the start, latency in seconds
    tokens: NDArray[np.int64]  # [answered]; of texts, the output's

    def to_json(self) -> dict[str, Any]:
        """Return the numbers for JSON, without those of each answer. Unknown numbers are null."""
        return {
            "planned": self.planned, "seconds": self.seconds, "overall": _json(self.overall),
            "by_adapter": {name: _json(numbers) for name, numbers in self.by_adapter.items()},
            "client": vars(self.client) | {"suspicion": self.client.suspicion},
        }  # fmt: skip


def _json(numbers: Latencies | TextNumbers) -> dict[str, Any]:
    shown = {name: None if value != value else value for name, value in vars(numbers).items()}  # JSON has no NaN
    text = shown.pop("text", None)
    if text:
        shown["text"] = _json(text)
    return shown


def summarize(logs: Sequence[ClientLog], planned: int, *, open_loop: bool) -> BenchResult:
    """Compute the numbers of a run.

    Args:
        planned: The number of requests in the plan.
        open_loop: Whether requests have planned times. Latency then counts from the planned time, even if a request was
            sent later.

    Raises:
        ValueError: No request was answered.
    """
    records = [record for log in logs for record in log.records]
    if not records:
        raise ValueError("expected at least one request to have been answered, got none")
    *columns, texts = zip(*records, strict=True)
    due, sent, done, tokens, prompts, models, outcomes = map(np.array, columns)
    latency = done - (due if open_loop else sent)
    seconds = float(done.max() - sent.min())
    times = TextTimes(logs, due if open_loop else sent) if any(texts) else None

    def of(chosen: NDArray[np.bool_]) -> Latencies:
        good = chosen & (outcomes == OK)
        waits = latency[good] * 1e3 if good.any() else np.array([np.nan])
        return Latencies(
            int(chosen.sum()), int(good.sum()), int(prompts[good].sum()), int(tokens[good].sum()),
            float(good.sum() / seconds), float(prompts[good].sum() / seconds), float(tokens[good].sum() / seconds),
            float(waits.mean()), **{f"p{p}_ms": float(np.percentile(waits, p)) for p in PERCENTILES},
            errors=dict(Counter(outcomes[chosen & ~good].tolist()).most_common()),
            text=times.of(chosen, good, seconds) if times else None,
        )  # fmt: skip

    good = outcomes == OK
    return BenchResult(
        planned, seconds, of(np.ones(len(sent), dtype=bool)),
        {name: of(models == name) for name in np.unique(models).tolist()},
        _client(logs, len(records), times.frames if times else 0, np.maximum(sent - due, 0.0) if open_loop else None),
        np.stack((done[good] - sent.min(), latency[good]), axis=1),
        times.output_tokens(good) if times else tokens[good],
    )  # fmt: skip


def _client(logs: Sequence[ClientLog], requests: int, frames: int, late_s: NDArray[np.float64] | None) -> ClientLoad:
    lags_ms = np.array([lag_s for log in logs for lag_s in log.lags_s] or [0.0]) * 1e3
    late: tuple[float | None, float | None, float | None] = (None, None, None)
    if late_s is not None:
        late = (float(late_s.mean() * 1e3), float(np.percentile(late_s, 99) * 1e3), float(late_s.max() * 1e3))
    cpu_s = sum(log.cpu_s for log in logs)
    return ClientLoad(
        len(logs), max(log.busy for log in logs), cpu_s * 1e3 / requests,
        float(np.percentile(lags_ms, 99)), float(lags_ms.max()), *late,
        tuple(log.busy for log in logs), cpu_s * 1e6 / frames if frames else None,
    )  # fmt: skip
