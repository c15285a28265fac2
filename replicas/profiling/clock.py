"""Measures durations with CUDA events on a GPU, and with the wall clock on the CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

_REPEATS, _WARMUPS = 10, 2


@dataclass
class StageClock:
    """Measures the stages of a batch. On CUDA, synchronize before calling `times_ms`."""

    device: torch.device
    _records: list[tuple[str, Any]] = field(default_factory=list)

    def record(self, stage: str) -> None:
        """Mark the end of a stage. The first call starts the clock."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
        self._records.append((stage, now))

    def times_ms(self) -> dict[str, list[float]]:
        """Return the durations of every call of each stage. The stages are in the order of their first calls."""
        times: dict[str, list[float]] = {}
        for (_, before), (stage, after) in zip(self._records, self._records[1:], strict=False):
            ms = before.elapsed_time(after) if self.device.type == "cuda" else (after - before) * 1e3
            times.setdefault(stage, []).append(ms)
        return times


def median_s(call: Callable[[], object], device: torch.device) -> float:
    times_s = []
    for _ in range(_WARMUPS + _REPEATS):
        clock = StageClock(device)
        clock.record("start")
        call()
        clock.record("call")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(clock.times_ms()["call"][0] * 1e-3)
    return median(times_s[_WARMUPS:])
