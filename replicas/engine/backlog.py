"""How much work of one kind waits, and how fast it is served. No clock."""

from dataclasses import dataclass
from math import exp, inf

_WINDOW_S = 10.0  # work that was served longer ago hardly counts in the rate
_LEAST_STEPS = 4  # that the rate is measured in


@dataclass(slots=True)
class Backlog:
    """Waiting work, and the rate at which steps have taken it while they left as much for the next.

    A rate at which little waits is that of the arrivals. So it is measured only while more waits, and anew each time.

    Attributes:
        work: tokens of prompts, or number of texts.
    """

    work: int = 0
    _steps: int = 0
    _began_s: float = 0.0
    _served: float = 0.0  # weighted by age, as of `_at_s`
    _at_s: float = 0.0

    def on_served(self, served: int, now_s: float) -> None:
        """Count the work that a step has taken from `work`."""
        if self.work < served:
            self._steps = 0
            return
        if not self._steps:
            self._began_s = self._at_s = now_s
            self._served = 0.0
        self._served = self._served * exp((self._at_s - now_s) / _WINDOW_S) + served
        self._at_s = now_s
        self._steps += 1

    def wait_s(self, now_s: float, measured_s: float) -> float:
        """Return how long the waiting work takes; 0 if the rate is not known.

        Args:
            measured_s: time for which the rate must have been measured.
        """
        if not self.work or self._steps < _LEAST_STEPS or now_s - self._began_s < measured_s:
            return 0.0
        served = self._served * exp((self._at_s - now_s) / _WINDOW_S)
        seconds = _WINDOW_S * (1.0 - exp((self._began_s - now_s) / _WINDOW_S))
        return self.work * seconds / served if served else inf
