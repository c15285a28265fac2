"""The numbers of texts: times to the first token, gaps between arrivals, and rates of output tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.command.bench.client import ClientLog
from ranklet.cluster.command.bench.text_answer import TextAnswer

_NAN = float("nan")


@dataclass(frozen=True)
class TextNumbers:
    """Numbers of some of the requests. All but `without_done` are of answered requests."""

    output_tokens: int
    output_tokens_per_s: float  # of the whole run
    tokens_by_usage: int  # output tokens that the server counted; of the others, each frame with text counts as one
    cached_tokens: int  # prompt tokens that the server took from its cache
    ttft_p50_ms: float  # time to the first text
    ttft_p99_ms: float
    gaps: int  # between arrivals of text in a stream
    tokens_per_gap: float  # mean tokens of an arrival after the first; above 1 if frames hold or reads join several
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    tpot_p50_ms: float  # mean time per output token of a request after its first arrival
    tpot_p99_ms: float
    finish_reasons: dict[str, int]
    without_done: int  # streams that ended without `data: [DONE]`, whatever their error


class TextTimes:
    """The arrivals of all answers of a run.

    Args:
        start_s: When the latency of each request began.
    """

    def __init__(self, logs: Sequence[ClientLog], start_s: NDArray[np.float64]) -> None:
        self._answers = [record.text for log in logs for record in log.records]
        self._start_s = start_s
        self._gaps_s = np.concatenate([np.frombuffer(log.gaps_s, np.float32) for log in logs])
        self._ends = np.cumsum([answer.gaps if answer else 0 for answer in self._answers])

    @property
    def frames(self) -> int:
        return sum(answer.frames for answer in self._answers if answer)

    def of(self, chosen: NDArray[np.bool_], good: NDArray[np.bool_], seconds: float) -> TextNumbers:
        """Return the numbers of the chosen requests, of which `good` were answered."""
        picked = [(i, answer) for i in np.flatnonzero(good).tolist() if (answer := self._answers[i])]
        answers = [answer for _, answer in picked]
        gaps_ms = self._gaps_ms(picked)
        tokens = sum(answer.output_tokens for answer in answers)
        first_ms = [(answer.first_s - self._start_s[i]) * 1e3 for i, answer in picked if answer.first_s is not None]
        after_first = sum(answer.output_tokens - answer.first_tokens for answer in answers if answer.gaps)
        per_token_ms = [_ms_per_token(answer) for answer in answers if answer.output_tokens > answer.first_tokens > 0]
        ended = [self._answers[i] for i in np.flatnonzero(chosen)]
        return TextNumbers(
            tokens, tokens / seconds, sum(answer.output_tokens for answer in answers if answer.from_usage),
            sum(answer.cached_tokens for answer in answers), _percentile(first_ms, 50), _percentile(first_ms, 99),
            len(gaps_ms), after_first / len(gaps_ms) if len(gaps_ms) else _NAN, _percentile(gaps_ms, 50),
            _percentile(gaps_ms, 99), _percentile(gaps_ms, 100), _percentile(per_token_ms, 50),
            _percentile(per_token_ms, 99), dict(Counter(str(answer.finish_reason) for answer in answers).most_common()),
            sum(answer is not None and not answer.done_marker for answer in ended),
        )  # fmt: skip

    def output_tokens(self, good: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.array([_tokens(self._answers[i]) for i in np.flatnonzero(good)], np.int64)

    def _gaps_ms(self, picked: list[tuple[int, TextAnswer]]) -> NDArray[np.float32]:
        parts = [self._gaps_s[self._ends[i] - answer.gaps : self._ends[i]] for i, answer in picked]
        return np.concatenate(parts) * np.float32(1e3) if parts else np.zeros(0, np.float32)


def _tokens(answer: TextAnswer | None) -> int:
    return answer.output_tokens if answer else 0


def _ms_per_token(answer: TextAnswer) -> float:
    assert answer.first_s is not None
    assert answer.last_s is not None
    return (answer.last_s - answer.first_s) * 1e3 / (answer.output_tokens - answer.first_tokens)


def _percentile(values: Sequence[float] | NDArray[np.float32], percent: int) -> float:
    return float(np.percentile(values, percent)) if len(values) else _NAN
