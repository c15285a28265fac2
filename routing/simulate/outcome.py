"""What came of a simulation: waits, hits, loads, balance; per second and over all."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class SimulationResult:
    """One rule's run. Requests that arrived before `warm_s` count for nothing but their second."""

    rule: str
    warm_s: float
    arrived_s: "array[float]" = field(default_factory=lambda: array("d"))
    wait_s: "array[float]" = field(default_factory=lambda: array("f"))
    hit: bytearray = field(default_factory=bytearray)
    busy: list[float] = field(default_factory=list)  # of each replica, after the warm-up
    loads: int = 0  # after the warm-up
    lost: int = 0  # sent again, since their replica died
    unfinished: int = 0  # a minute after the last arrival; each counts as having waited for all of that time
    seconds: float = 0.0

    def enter(self, arrived_s: float, wait_s: float, hit: bool) -> None:
        self.arrived_s.append(arrived_s)
        self.wait_s.append(wait_s)
        self.hit.append(hit)

    def row(self) -> dict[str, Any]:
        """The whole run as one row of a table."""
        waits, hits = self._counted()
        measured_s = self.seconds - self.warm_s
        return {
            "rule": self.rule, "requests": len(waits), "hit rate": float(hits.mean()),
            "p50_ms": float(np.percentile(waits, 50) * 1e3), "p99_ms": float(np.percentile(waits, 99) * 1e3),
            "mean_ms": float(waits.mean() * 1e3), "loads_per_s": self.loads / measured_s,
            "busiest / mean": max(self.busy) / (sum(self.busy) / len(self.busy)), "sent again": self.lost,
            "unfinished": self.unfinished,
        }  # fmt: skip

    def _counted(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        counted = np.frombuffer(self.arrived_s, np.float64) >= self.warm_s
        return np.frombuffer(self.wait_s, np.float32)[counted], np.frombuffer(self.hit, np.uint8)[counted]

    def by_second(self) -> list[tuple[int, float, float]]:
        """(second of arrival, p99 of the wait in seconds, hit rate)."""
        arrived = np.frombuffer(self.arrived_s, np.float64).astype(int)
        waits, hits = np.frombuffer(self.wait_s, np.float32), np.frombuffer(self.hit, np.uint8)
        return [
            (int(second), float(np.percentile(waits[arrived == second], 99)), float(hits[arrived == second].mean()))
            for second in np.unique(arrived)
        ]
