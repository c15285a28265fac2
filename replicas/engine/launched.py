"""A step on the device, and its outputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranklet.replicas.model.heads import Head

SKIPPED = -1  # in the place of an item: nothing reads this output


@dataclass(frozen=True, slots=True)
class OutputGroup:
    """The outputs of one head in a step.

    Attributes:
        members: the item of the step (a decode or a span) that each output belongs to; SKIPPED for none.
        arrays: the head's outputs on the host, valid after `LaunchedStep.wait`. Their first dimension is at least
            the number of members.
    """

    head: Head
    members: Sequence[int]
    arrays: tuple[Tensor, ...]

    def results(self) -> Iterable[tuple[int, Any]]:
        """Return pairs of an item and its output; None for an invalid output."""
        results = zip(self.members, self.head.results(self.arrays, len(self.members)), strict=True)
        if SKIPPED not in self.members:
            return results
        return ((member, output) for member, output in results if member != SKIPPED)


@dataclass(slots=True)
class LaunchedStep:
    """A step on the device.

    Attributes:
        launch_s: duration of the launch. On the CPU it is the whole computation.
        events: CUDA events before and after the step; None on the CPU.
    """

    groups: list[OutputGroup]
    backend: str
    launched_s: float
    launch_s: float
    events: tuple[Any, Any] | None

    def wait(self) -> None:
        """Wait for the device."""
        if self.events is not None:
            self.events[1].synchronize()

    def device_s(self) -> float:
        """Return the device time of the step; valid after `wait`."""
        return self.launch_s if self.events is None else float(self.events[0].elapsed_time(self.events[1])) * 1e-3


def to_host(output: Tensor) -> Tensor:
    """Start to copy an output to the host."""
    if not output.is_cuda:
        return output
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    host.copy_(output, non_blocking=True)
    return host


def record_event(device: torch.device) -> Any:
    """Record a CUDA event on the current stream; None on the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
