"""The result of a simulation: waits, hits, loads and balance, per second and in total."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class SimulationResult:
    """One rule's run.

    Attributes:
        warm_s: requests that arrived before this time count only in `by_second`.
        arrived_s, wait_s, hit: of each request.
        busy_s: of each replica, after the warm-up.
        loads: after the warm-up.
        resent: requests sent again because their replica died.
        unfinished: requests without an answer a minute after the last arrival. Each counts with its wait until then.
        seconds: simulated time.
    """

    rule: str
    warm_s: float
    arrived_s: "array[float]" = field(default_factory=lambda: array("d"))
    wait_s: "array[float]" = field(default_factory=lambda: array("f"))
    hit: bytearray = field(default_factory=bytearray)
    busy_s: list[float] = field(default_factory=list)
    loads: int = 0
    resent: int = 0
    unfinished: int = 0
    seconds: float = 0.0

    def add_request(self, arrived_s: float, wait_s: float, hit: bool) -> None:
        self.arrived_s.append(arrived_s)
        self.wait_s.append(wait_s)
        self.hit.append(hit)

    def row(self) -> dict[str, Any]:
        waits, hits = self._after_warm_up()
        measured_s = self.seconds - self.warm_s
        return {
            "rule": self.rule, "requests": len(waits), "hit rate": float(hits.mean()),
            "p50_ms": float(np.percentile(waits, 50) * 1e3), "p99_ms": float(np.percentile(waits, 99) * 1e3),
            "mean_ms": float(waits.mean() * 1e3), "loads_per_s": self.loads / measured_s,
            "busiest / mean": self.busiest_by_mean, "sent again": self.resent,
            "unfinished": self.unfinished,
        }  # fmt: skip

    @property
    def busiest_by_mean(self) -> float:
        return max(self.busy_s) / (sum(self.busy_s) / len(self.busy_s))

    def _after_warm_up(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        counted = np.frombuffer(self.arrived_s, np.float64) >= self.warm_s
        return np.frombuffer(self.wait_s, np.float32)[counted], np.frombuffer(self.hit, np.uint8)[counted]

    def by_second(self) -> list[tuple[int, float, float]]:
        """Return for each second of arrival: the second, the p99 of the wait in seconds, the hit rate."""
        arrived = np.frombuffer(self.arrived_s, np.float64).astype(int)
        waits, hits = np.frombuffer(self.wait_s, np.float32), np.frombuffer(self.hit, np.uint8)
        return [
            (int(second), float(np.percentile(waits[arrived == second], 99)), float(hits[arrived == second].mean()))
            for second in np.unique(arrived)
        ]
