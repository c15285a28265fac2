"""Random conversations: system prompts by adapter, several turns, lognormal lengths of questions and answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

import numpy as np

from ranklet.routing.hint import TextHint
from ranklet.routing.prefix import PAGE_TOKENS
from ranklet.routing.simulate.engine import SimulatedRequest

_SIGMA = 0.6  # standard deviation of the logarithm of a length
_COMMON_TEXTS = 20
_CHUNK = 8192  # conversations drawn at once


@dataclass(frozen=True, slots=True)
class TextTraffic:
    """The parameters of conversations.

    Attributes:
        rate: texts per second, over all turns.
        system_tokens: length of the system prompts. Half of the adapters have their own, the others one of 20 texts.
        question_tokens, answer_tokens: means.
        turns: mean number of turns of a conversation.
        pause_s: mean time from an answer to the next question.
    """

    rate: float
    adapters: int
    zipf: float
    seconds: float
    system_tokens: int = 1500
    question_tokens: int = 150
    answer_tokens: int = 200
    turns: float = 4.0
    pause_s: float = 4.0
    seed: int = 0

    @property
    def context_tokens(self) -> float:
        """Return about how many tokens a text has before its answer."""
        return self.system_tokens + self.turns * self.question_tokens + (self.turns - 1) * self.answer_tokens


@dataclass(slots=True, eq=False)
class SimulatedText(SimulatedRequest):
    """One turn. `tokens` are those of its prompt.

    Attributes:
        pages: hashes of its full pages, then of those that its answer fills.
        plain: the same without regard to the adapter.
        ideal: tokens of the prompt that one infinite cache of all replicas would have.
        cached: tokens of the prompt that were found in the cache.
        known: tokens of the prompt, and of an answer that was interrupted by a preemption.
        missing: tokens that are not computed yet.
        end_step: number of the step that ends the answer.
    """

    pages: Sequence[int] = ()
    plain: Sequence[int] = ()
    answer: int = 1
    ideal: int = 0
    cached: int | None = None
    known: int = 0
    missing: int = 0
    held: Sequence[int] = ()
    first_s: float = 0.0
    started: int = 0
    end_step: int = 0

    @property
    def prompt_pages(self) -> Sequence[int]:
        return self.pages[: self.tokens // PAGE_TOKENS]

    def hint(self) -> TextHint:
        return TextHint(self.prompt_pages, 1, self.tokens + self.answer)

    def restart(self) -> None:
        self.known, self.missing, self.held, self.cached = self.tokens, 0, (), None


@dataclass(slots=True, eq=False)
class Conversation:
    """The state of one conversation."""

    adapter: str
    turns: int
    pages: list[int]
    plain: list[int]
    tokens: int
    ideal: int


@dataclass(slots=True)
class Conversations:
    """Draws conversations and their turns."""

    traffic: TextTraffic
    _random: Random = field(init=False)
    _page: "count[int]" = field(default_factory=lambda: count(1 << 60))
    _system: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # pages by adapter and text
    _plain: dict[int, list[int]] = field(default_factory=dict)  # pages by text
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = Random(self.traffic.seed)

    def starts(self) -> Iterator[tuple[float, Conversation]]:
        """Yield the time of the first question of each conversation, and the conversation."""
        traffic, rng = self.traffic, np.random.default_rng(self.traffic.seed)
        weights = np.arange(1, traffic.adapters + 1, dtype=float) ** -traffic.zipf
        edges = np.cumsum(weights / weights.sum())
        now_s = 0.0
        while True:
            times = now_s + np.cumsum(rng.exponential(traffic.turns / traffic.rate, _CHUNK))
            drawn = np.minimum(np.searchsorted(edges, rng.random(_CHUNK)), traffic.adapters - 1)
            turns = rng.geometric(1 / traffic.turns, _CHUNK)
            for at_s, which, length in zip(times.tolist(), drawn.tolist(), turns.tolist(), strict=True):
                if at_s > traffic.seconds:
                    return
                yield at_s, self._conversation(which, length)
            now_s = float(times[-1])

    def _conversation(self, which: int, turns: int) -> Conversation:
        adapter, text = f"a{which}", which if which % 2 else -1 - which // 2 % _COMMON_TEXTS
        pages = self.traffic.system_tokens // PAGE_TOKENS
        plain = self._plain.setdefault(text, [hash((text, page)) >> 4 for page in range(pages)])
        own = self._system.setdefault(
            (adapter, text), [hash((which, text, page)) & (1 << 60) - 1 for page in range(pages)]
        )
        ideal = pages * PAGE_TOKENS if (adapter, text) in self._seen else 0
        self._seen.add((adapter, text))
        return Conversation(adapter, turns, list(own), list(plain), self.traffic.system_tokens, ideal)

    def next_turn(self, talk: Conversation, id: int, gateway: int, now_s: float) -> SimulatedText:
        traffic = self.traffic
        talk.turns -= 1
        prompt = talk.tokens + self._length(traffic.question_tokens)
        answer = self._length(traffic.answer_tokens)
        talk.tokens = prompt + answer
        new = (talk.tokens - 1) // PAGE_TOKENS - len(talk.pages)
        more = [next(self._page) for _ in range(new)]
        talk.pages += more
        talk.plain += more
        turn = SimulatedText(
            id, talk.adapter, prompt, gateway, now_s, pages=tuple(talk.pages), plain=tuple(talk.plain), answer=answer,
            ideal=min(talk.ideal, (prompt - 1) // PAGE_TOKENS * PAGE_TOKENS), known=prompt,
        )  # fmt: skip
        talk.ideal = len(talk.pages) * PAGE_TOKENS
        return turn

    def pause_s(self) -> float:
        return self._random.expovariate(1 / self.traffic.pause_s)

    def _length(self, mean: int) -> int:
        return max(1, min(int(mean * self._random.lognormvariate(-(_SIGMA**2) / 2, _SIGMA)), 4 * mean))
