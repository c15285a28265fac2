"""How long the parts of an engine's start take."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class StartTimes:
    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the context as a part of the start."""
        began_s = perf_counter()
        yield
        self._seconds[name] = perf_counter() - began_s

    def summary(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.1f} s: {parts}"
