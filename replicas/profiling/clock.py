"""Times between marks: of the device where there is one, else of the CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

_REPEATS, _WARM = 10, 2


@dataclass
class Clock:
    """Gathers marks; on CUDA an event each, so that it may be read only once the device is done."""

    device: torch.device
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, stage: str) -> None:
        """Say that `stage` has just been launched."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
        self._marks.append((stage, now))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each call of each stage, in the order of their first; the first mark only begins."""
        found: dict[str, list[float]] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            ms = before.elapsed_time(after) if self.device.type == "cuda" else (after - before) * 1e3
            found.setdefault(stage, []).append(ms)
        return found


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call keeps the device: the median of some."""
    times = []
    for _ in range(_WARM + _REPEATS):
        clock = Clock(device)
        clock.mark("begin")
        call()
        clock.mark("call")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock.read()["call"][0] * 1e-3)
    return median(times[_WARM:])
