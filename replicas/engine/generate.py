"""The task that generates text: token ids in, token ids out."""

from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterInfo
from ranklet.replicas.cache.prefix import PrefixRoot, page_hashes
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.model.sampled import PromptScores, SampledToken, TokenLogprob

if TYPE_CHECKING:
    from ranklet.replicas.grammar.compiler import GrammarCompiler
    from ranklet.replicas.model.heads import TextHead

STOP, LENGTH = "stop", "length"


# New tokens of a choice, and the logprob of each; None if the request did not ask. A step makes one for each text, as a
# plain tuple in 0.01 us. An object of a class would take 0.2 us.
TokenPiece = tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]


@dataclass(frozen=True, slots=True)
class TextChoice:
    """The output for one prompt.

    Attributes:
        tokens: int32 [length], with those that the request gave and the token that ended it.
        finish_reason: stop or length.
        stop_token: the token that ended it; None at the length limit, or if the client ended it.
        logprobs: of each generated token; None if the request did not ask.
    """

    tokens: NDArray[np.int32]
    finish_reason: str
    stop_token: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of a request: `n` choices for each prompt, prompt by prompt.

    Attributes:
        cached_tokens: prompt tokens of the first choices that were in the prefix cache and therefore not computed.
        prompt_logprobs: of each prompt's tokens from the second on; None if the request did not ask.
    """

    choices: tuple[TextChoice, ...]
    cached_tokens: int = 0
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None


@dataclass(slots=True)
class _Output:
    logprobs: list[TokenLogprob] = field(default_factory=list)
    choice: TextChoice | None = None


class GenerateTask:
    """Generates up to `params.max_tokens` tokens for each choice of each prompt.

    Args:
        prompts: number of prompts.
        end_ids: tokens that end a text of the base model.
        seed: makes the draws repeatable.
        root: root of the pages' hashes; None shares no pages.
    """

    def __init__(
        self, params: GenerateParams, prompts: int, head: "TextHead", end_ids: Collection[int], seed: int,
        root: PrefixRoot | None,
    ) -> None:  # fmt: skip
        self.choices = params.n
        self._params = params
        self._end_ids = tuple(end_ids)
        self._stop_ids = frozenset[int]()
        self._head = head
        self._seed = seed
        self._root = root
        self._outputs = [_Output() for _ in range(prompts * params.n)]
        self._prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in range(prompts)]
        self._cached_tokens = 0

    @property
    def is_slow(self) -> bool:
        return False

    @property
    def has_grammar(self) -> bool:
        return self._params.grammar is not None

    def begin_grammars(self, compiler: "GrammarCompiler", sequences: Many[Sequence]) -> None:
        """Give each sequence the state of its grammar. May take long. Raises InvalidRequest."""
        params = self._params
        assert params.grammar is not None, "called without `has_grammar`"
        for sequence in sequences:
            sequence.grammar = compiler.start_text(
                params.grammar, sequence.ids[sequence.prompt :].tolist(), params.allowed_token_ids,
                params.stop_token_ids, params.min_tokens,
            )  # fmt: skip

    def prepare(self, sequences: Many[Sequence]) -> None:
        for first in range(0, len(sequences), self.choices):
            scored = sequences[first] if self._params.prompt_logprobs is not None else None
            prompt, adapted_from = sequences[first].ids[: sequences[first].prompt], sequences[first].adapted_from
            hashes = () if self._root is None else page_hashes(self._root, prompt, (), adapted_from)
            for sequence in sequences[first : first + self.choices]:
                sequence.root = self._root
                sequence.hashes = None
                if self._root is not None:
                    sequence.hashes = [*hashes, *page_hashes(self._root, sequence.ids, hashes, adapted_from)]
                sequence.reads_cache = sequence is not scored
                sequence.scores = self._params.prompt_logprobs if sequence is scored else None

    def start(self, sequence: Sequence, adapter: AdapterInfo | None) -> None:
        end_ids = () if adapter is None else adapter.end_ids
        if sequence.sampling is not None:
            return
        if sequence.grammar is not None:
            sequence.grammar.add_ends(end_ids)
        ends = () if self._params.ignore_eos else (*self._end_ids, *end_ids)
        self._stop_ids = frozenset((*ends, *self._params.stop_token_ids))
        sequence.sampling = self._params.sampling(
            seed=self._seed, eos_ids=sorted(set(ends)), prompt_tokens=sequence.prompt,
            choice=sequence.index % self.choices,
        )  # fmt: skip

    def need(self, sequence: Sequence) -> Need:
        outputs = self._params.max_tokens - (sequence.length - sequence.prompt)
        return Need(sequence.length, self._head, outputs, keeps_cache=True, divisible=True)

    def accept(self, sequence: Sequence, output: int | SampledToken) -> tuple[TokenPiece, bool]:
        params, logprobs = self._params, None
        if isinstance(output, int):
            token = output
        else:
            token = output.token
            if params.logprobs is not None:
                logprobs = (output.best(params.logprobs),)
                self._outputs[sequence.index].logprobs += logprobs
        sequence.append(token)
        piece = (token,), logprobs
        produced = sequence.length - sequence.prompt
        # A text with a grammar ends before `min_tokens` if it is complete, and only then draws a token that ends it.
        if token in self._stop_ids and (produced > params.min_tokens or sequence.grammar is not None):
            self._end(sequence, STOP, token)
        elif sequence.finishing:
            self._end(sequence, STOP, None)
        elif produced == params.max_tokens:
            self._end(sequence, LENGTH, None)
        else:
            return piece, False
        return piece, True

    def accept_scores(self, sequence: Sequence, scores: PromptScores) -> None:
        """Take logprobs of the prompt. After a preemption they may come again."""
        known = self._prompt_logprobs[sequence.index // self.choices]
        end = scores.start + len(scores.logprobs)
        known += [scores.of(token, sequence.scores or 0) for token in range(1 + len(known), end)]

    def _end(self, sequence: Sequence, reason: str, stop_token: int | None) -> None:
        output = self._outputs[sequence.index]
        logprobs = None if self._params.logprobs is None else tuple(output.logprobs)
        output.choice = TextChoice(sequence.ids[sequence.prompt :].copy(), reason, stop_token, logprobs)
        if sequence.index % self.choices == 0:
            self._cached_tokens += min(sequence.cached_tokens or 0, sequence.prompt)

    def result(self) -> Generation:
        choices = tuple(output.choice for output in self._outputs if output.choice is not None)
        asked = self._params.prompt_logprobs is not None
        prompt_logprobs = tuple(map(tuple, self._prompt_logprobs)) if asked else None
        return Generation(choices, self._cached_tokens, prompt_logprobs)
