"""The result of a simulation of texts: first tokens, gaps, hits in the prefix cache, preemptions and balance."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.simulate.conversations import SimulatedText
from ranklet.routing.simulate.outcome import SimulationResult

# A text counts for the goodput if it is at least as fast as this.
FIRST_TOKEN_S = 0.2
GAP_S = 0.02


@dataclass
class TextResult(SimulationResult):
    """One rule's run. `wait_s` is the time to the first token.

    Attributes:
        gap_s: mean time between the tokens of each text.
        tokens, cached, ideal: of each prompt: its tokens, those found in the cache, and those that one infinite cache
            of all replicas would have had.
        step_s, decodes: of each step after the warm-up.
        preemptions: so far.
    """

    gap_s: "array[float]" = field(default_factory=lambda: array("f"))
    tokens: "array[int]" = field(default_factory=lambda: array("l"))
    cached: "array[int]" = field(default_factory=lambda: array("l"))
    ideal: "array[int]" = field(default_factory=lambda: array("l"))
    step_s: "array[float]" = field(default_factory=lambda: array("f"))
    decodes: "array[int]" = field(default_factory=lambda: array("l"))
    preemptions: int = 0

    def add_text(self, text: SimulatedText, now_s: float) -> None:
        self.add_request(text.arrived_s, text.first_s - text.arrived_s, text.hit)
        self.gap_s.append((now_s - text.first_s) / max(text.answer - 1, 1))
        self.tokens.append(text.tokens)
        self.cached.append(text.cached or 0)
        self.ideal.append(text.ideal)

    def add_step(self, now_s: float, step_s: float, decodes: int) -> None:
        if decodes and now_s >= self.warm_s:
            self.step_s.append(step_s)
            self.decodes.append(decodes)

    def row(self) -> dict[str, Any]:
        arrived = np.frombuffer(self.arrived_s, np.float64)
        ended = len(self.gap_s)  # texts without an end come last
        counted = (arrived >= self.warm_s) & (arrived < self.seconds)
        first_s, hit = np.frombuffer(self.wait_s, np.float32)[counted], np.frombuffer(self.hit, np.uint8)[counted]
        counted = counted[:ended]
        gap_s = np.frombuffer(self.gap_s, np.float32)[counted]
        tokens, cached, ideal = (
            np.frombuffer(each, np.int64)[counted].sum() for each in (self.tokens, self.cached, self.ideal)
        )
        good = (np.frombuffer(self.wait_s, np.float32)[:ended][counted] <= FIRST_TOKEN_S) & (gap_s <= GAP_S)
        return {
            "rule": self.rule, "texts": len(first_s),
            "first_p50_ms": _ms(first_s, 50), "first_p99_ms": _ms(first_s, 99),
            "gap_p50_ms": self._token_gap_ms(0.5), "gap_p99_ms": self._token_gap_ms(0.99),
            "goodput_per_s": float(good.sum()) / (self.seconds - self.warm_s), "adapter hits": float(hit.mean()),
            "prefix hits": float(cached / tokens), "of one cache": float(cached / ideal),
            "busiest / mean": self.busiest_by_mean,
            "loads_per_s": self.loads / (self.seconds - self.warm_s), "preemptions": self.preemptions,
            "unfinished": self.unfinished,
        }  # fmt: skip

    def _token_gap_ms(self, share: float) -> float:
        """Return the gap that this share of all tokens had at most."""
        step_s, decodes = np.frombuffer(self.step_s, np.float32), np.frombuffer(self.decodes, np.int64)
        order = step_s.argsort()
        total = np.cumsum(decodes[order])
        return float(step_s[order[np.searchsorted(total, share * total[-1])]] * 1e3)


def _ms(seconds: NDArray[np.float32], percentile: float) -> float:
    return float(np.percentile(seconds, percentile) * 1e3)
