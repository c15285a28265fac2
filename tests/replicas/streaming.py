"""Requests for texts whose tokens are kept as they come."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.engine.generate import Generation, TokenPiece
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.errors import RankletError
from ranklet.replicas.model.sampled import TokenLogprob
from tests.replicas.asking import PATIENCE_S

GREEDY = GenerateParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = GenerateParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@dataclass
class TextSink:
    """Keeps the tokens of each choice as they come; `on_piece` runs on the engine's thread."""

    on_piece: Callable[[], None] = lambda: None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    ended: "Future[Answer]" = field(default_factory=Future)
    late: int = 0  # calls after the end
    cached: dict[int, int] = field(default_factory=dict)  # tokens of the prompt, by choice

    def begun(self, index: int, cached_tokens: int) -> None:
        self.late += self.ended.done()
        self.cached[index] = cached_tokens

    def delta(self, index: int, piece: TokenPiece) -> None:
        self.late += self.ended.done()
        tokens, logprobs = piece
        self.tokens.setdefault(index, []).extend(tokens)
        self.logprobs.setdefault(index, []).extend(logprobs or ())
        self.on_piece()

    def done(self, result: Answer | RankletError) -> None:
        self.late += self.ended.done()
        if isinstance(result, RankletError):
            self.ended.set_exception(result)
        else:
            self.ended.set_result(result)

    def generation(self) -> Generation:
        result = self.ended.result(PATIENCE_S).result
        assert isinstance(result, Generation)
        assert not self.late, "nothing comes after the end"
        return result


def draw(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 1024, length, dtype=np.int32) for length in lengths]
