"""Measures what work takes on a replica: prompts, and the tokens of texts.

The unit of work is a token of a prompt. A decoded token takes longer: its step reads all weights, and its text's keys
and values. Both are measured in steps, so that the weight of a decoded token follows from the model and the device.
"""

from dataclasses import dataclass

_PROMPTS_WINDOW = 500_000  # tokens
_DECODES_WINDOW = 100_000  # tokens
_TEXTS_WINDOW = 256  # texts


@dataclass
class RunningMean:
    """Weighted mean of the recent values, which have a total weight of about `window`."""

    window: float
    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.weight = min(self.weight, self.window) + weight
        self.value += (value - self.value) * weight / self.weight


class SpeedMeter:
    """The speed of one replica. Means are weighted by tokens, because a full queue is served in large steps."""

    def __init__(self) -> None:
        self._prompts = RunningMean(_PROMPTS_WINDOW)  # tokens per second
        self._decode_s = RunningMean(_DECODES_WINDOW)
        self._output = RunningMean(_TEXTS_WINDOW)
        self._kept = RunningMean(_TEXTS_WINDOW)
        self._lifetime_s = RunningMean(_TEXTS_WINDOW)
        self._uncached = RunningMean(_TEXTS_WINDOW, value=1.0)

    def add_step(self, tokens: int, generated: int, seconds: float) -> None:
        """Count a step that has computed these tokens of prompts, and has generated tokens."""
        if seconds <= 0:
            return
        if tokens:
            self._prompts.add(tokens / seconds, tokens)
        elif generated:
            self._decode_s.add(seconds / generated, generated)

    def add_prompt(self, tokens: int, cached_tokens: int) -> None:
        """Count a text's prompt, of which a part was in the cache."""
        if tokens:
            self._uncached.add(max(tokens - cached_tokens, 0) / tokens)

    def add_text(self, output_tokens: int, kept_tokens: int, seconds: float) -> None:
        """Count a text that has ended.

        Args:
            kept_tokens: tokens of the key-value cache that it gives back.
            seconds: since its first token.
        """
        self._output.add(output_tokens)
        self._kept.add(kept_tokens)
        self._lifetime_s.add(seconds)

    @property
    def work_per_s(self) -> float:
        """Return the work per second of steps with prompts; 0 if not measured yet."""
        return self._prompts.value

    @property
    def uncached_share(self) -> float:
        """Return the part of texts' prompts that is not found in the cache."""
        return self._uncached.value

    @property
    def text_work(self) -> float:
        """Return the work of the tokens of one text; 0 if not measured yet."""
        return self._output.value * self._decode_s.value * self._prompts.value

    def ended_per_s(self, texts: int) -> float:
        """Return how many of this many running texts end per second; 0 if not measured yet."""
        return texts / self._lifetime_s.value if self._lifetime_s.value else 0.0

    def freed_per_s(self, texts: int) -> float:
        """Return the tokens of the key-value cache that this many running texts give back per second."""
        return self._kept.value * self.ended_per_s(texts)
