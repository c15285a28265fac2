"""What a run gave, in numbers: rates, latencies, errors, and what the client itself cost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.bench.client import OK, Log

PERCENTILES = (50, 90, 95, 99)
_BUSY, _LATE_S = 0.8, 0.01  # above these the client may have been the bottleneck


@dataclass(frozen=True)
class Numbers:
    """Answers to some of the requests. Rates are per second of the whole run; latencies are of answers with vectors."""

    requests: int
    answered: int
    prompts: int  # of answered requests
    tokens: int  # the same, as the server counted them
    requests_per_s: float
    prompts_per_s: float
    tokens_per_s: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    errors: dict[str, int]


@dataclass(frozen=True)
class Client:
    """The load client's own cost."""

    processes: int
    busiest: float  # share of a core that the busiest process used
    mean_late_ms: float  # how long after its time a request left
    p99_late_ms: float

    @property
    def suspicion(self) -> str | None:
        """Why the client, and not the server, may have set the numbers; None if it did not."""
        if self.busiest > _BUSY:
            return f"a client process used {self.busiest:.0%} of a core: raise --processes"
        if self.p99_late_ms > _LATE_S * 1e3:
            return f"requests left up to {self.p99_late_ms:.0f} ms late: raise --processes, or use an idle machine"
        return None


@dataclass(frozen=True)
class Outcome:
    """A whole run."""

    seconds: float  # from the first request that left to the last answer
    overall: Numbers
    by_adapter: dict[str, Numbers]
    client: Client
    answers: NDArray[np.float64]  # [answered, 2]: when, in seconds after the start, and its latency in seconds
    tokens: NDArray[np.int64]  # [answered]

    def facts(self) -> dict[str, Any]:
        """As JSON, without the single answers."""
        return {
            "seconds": self.seconds, "overall": vars(self.overall),
            "by_adapter": {name: vars(numbers) for name, numbers in self.by_adapter.items()},
            "client": vars(self.client) | {"suspicion": self.client.suspicion},
        }  # fmt: skip


def outcome(logs: Sequence[Log], names: Sequence[str], *, open_loop: bool) -> Outcome:
    """The numbers of a run.

    Args:
        names: whom each label stands for.
        open_loop: latency counts from when a request was due.

    Raises:
        ValueError: nothing was sent.
    """
    records = [record for log in logs for record in log.records]
    if not records:
        raise ValueError("expected at least one request to have been answered, got none")
    due, sent, done = (np.array([record[i] for record in records]) for i in range(3))
    tokens, prompts, labels = (np.array([record[i] for record in records], dtype=np.int64) for i in range(3, 6))
    outcomes = np.array([record.outcome for record in records])
    latency = done - (due if open_loop else sent)
    seconds = float(done.max() - sent.min())

    def of(chosen: NDArray[np.bool_]) -> Numbers:
        good = chosen & (outcomes == OK)
        waits = latency[good] * 1e3
        ms = {f"p{p}_ms": float(np.percentile(waits, p)) if len(waits) else float("nan") for p in PERCENTILES}
        return Numbers(
            int(chosen.sum()), int(good.sum()), int(prompts[good].sum()), int(tokens[good].sum()),
            float(good.sum() / seconds), float(prompts[good].sum() / seconds), float(tokens[good].sum() / seconds),
            float(waits.mean()) if len(waits) else float("nan"), **ms,
            errors=dict(Counter(outcomes[chosen & ~good].tolist()).most_common()),
        )  # fmt: skip

    late_ms = np.maximum(sent - due, 0.0) * 1e3 if open_loop else np.zeros(1)
    client = Client(len(logs), max(log.busy for log in logs), float(late_ms.mean()), float(np.percentile(late_ms, 99)))
    good = outcomes == OK
    present = np.unique(labels).tolist()
    return Outcome(
        seconds, of(np.ones(len(sent), dtype=bool)), {names[label]: of(labels == label) for label in present}, client,
        np.stack((done[good] - sent.min(), latency[good]), axis=1), tokens[good],
    )  # fmt: skip
