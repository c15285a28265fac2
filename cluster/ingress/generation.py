"""The choices of one text request, from the tokens that replicas send to the pieces of text that its answer gets."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from ranklet.cluster.ingress.fields import TextOptions
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.ingress.text_call import Logprobs
from ranklet.cluster.message import Begun, InferenceReply
from ranklet.cluster.text.choice import NOTHING, ChoiceText, Logprob, TextPiece
from ranklet.cluster.text.detokenizer import Detokenizer
from ranklet.cluster.text.frames import usage_of
from ranklet.cluster.text.token_bytes import TokenBytes
from ranklet.cluster.text_result import GenerateResult
from ranklet.replicas.engine.generate import LENGTH, STOP
from ranklet.replicas.engine.params import GenerateParams

_CONTEXT_TOKENS = 16  # of the prompt's end, where a character may be incomplete


class PieceSink(Protocol):
    """Gets the text of each choice."""

    def add(self, index: int, piece: TextPiece) -> None:
        """Take a piece, which may have no text, but follows a token."""

    def end(self, index: int, piece: TextPiece, choice: ChoiceText) -> None:
        """Take the last piece."""


class TextGeneration:
    """The choices of a request; implements `ranklet.cluster.ingress.text_call.TextReceiver`.

    A choice ends here as soon as its last token has arrived, not with the answer of its call, which has many choices.

    Args:
        end_ids: tokens that end a text of the model.
        on_tokens: called with a choice's index and the number of its tokens that have arrived.
        shown_ids: special tokens that belong to the texts.

    Attributes:
        end_ids: tokens that end the texts: those of the model, if the request does not ignore them, and its own.
        begun: where each call of the request has run.
        prompt_logprobs: of each prompt, if the request asked; the first token has none.
    """

    def __init__(
        self, prompts: TokenIds, params: GenerateParams, options: TextOptions, token_bytes: TokenBytes,
        end_ids: frozenset[int], sink: PieceSink, on_tokens: Callable[[int, int], None],
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.begun: list[Begun] = []
        self.prompt_logprobs: list[list[Logprob | None]] | None = None
        self._params = params
        self._options = options
        self._sink = sink
        self._on_tokens = on_tokens
        self._cached_tokens = 0
        self.end_ids = options.end_ids if options.ignores_ends else options.end_ids | end_ids
        contexts = [[] if options.echoes else prompt[-_CONTEXT_TOKENS:].tolist() for prompt in prompts]
        self._choices = [
            ChoiceText(
                Detokenizer(token_bytes, context, skip_special=options.skips_special, shown_ids=shown_ids),
                options.stops,
                end_ids=self.end_ids,
                include_stop=options.includes_stop,
                keeps_tokens=options.keeps_tokens,
                min_tokens=params.min_tokens,
            )
            for context in contexts
            for _ in range(params.n)
        ]
        self._echoed = [not options.echoes] * len(self._choices)
        # The tokens of texts that begin with logprobs of the prompt, which arrive last.
        self._waiting: list[tuple[list[int], list[Logprob]]] | None = None
        if options.waits_for_prompt_logprobs:
            self._waiting = [([], []) for _ in self._choices]

    def begin(self, begun: Begun) -> None:
        self.begun.append(begun)

    def receive(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> bool:
        if self._waiting is not None:
            waiting_tokens, waiting_logprobs = self._waiting[index]
            waiting_tokens += tokens
            waiting_logprobs += _plain(logprobs)
            self._on_tokens(index, 0 if self._options.drops_output else len(tokens))
            return True
        choice = self._choices[index]
        if choice.finish_reason is None:
            before = choice.used_tokens
            self._push(index, choice, tokens, _plain(logprobs))
            self._on_tokens(index, choice.used_tokens - before)
        return choice.matched is None

    def complete(self, replies: Sequence[InferenceReply[GenerateResult]]) -> None:
        """Take the replies to the calls, whose tokens have all been received."""
        results = [reply.result for reply in replies]
        self._cached_tokens = sum(result.cached_tokens for result in results)
        if self._params.prompt_logprobs is not None:
            packed = [each for result in results for each in result.prompt_logprobs or ()]
            self.prompt_logprobs = [[None, *each.unpack()] for each in packed]
        reasons = [choice.finish_reason for result in results for choice in result.choices]
        waiting, self._waiting = self._waiting, None
        for index, choice in enumerate(self._choices):
            if waiting is not None:
                self._push(index, choice, *waiting[index])
            if choice.finish_reason is None:
                self._end(index, choice, reasons[index], NOTHING)

    def reasons(self) -> list[str]:
        """Return why each choice that has ended did so."""
        return [choice.finish_reason for choice in self._choices if choice.finish_reason is not None]

    def usage(self) -> dict[str, Any]:
        """Return the usage so far. Cached tokens are known at the end."""
        completion = sum(choice.used_tokens for choice in self._choices)
        return usage_of(self._prompt_tokens, completion, self._cached_tokens)

    @cached_property
    def _prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def _push(self, index: int, choice: ChoiceText, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        piece = NOTHING
        if not self._echoed[index]:
            self._echoed[index] = True
            piece = self._echo(index, choice)
        if self._options.drops_output:
            self._end(index, choice, LENGTH, piece)
            return
        piece = _joined(piece, choice.push(tokens, logprobs or None))
        if choice.has_ended:
            self._end(index, choice, STOP, piece)
        elif choice.used_tokens >= self._params.max_tokens:
            self._end(index, choice, LENGTH, piece)
        else:
            self._sink.add(index, piece)

    def _echo(self, index: int, choice: ChoiceText) -> TextPiece:
        prompt = index // self._params.n
        scores = None
        if self.prompt_logprobs is not None and self._options.shows_logprobs:
            best = self._params.logprobs or 0
            scores = [each and (each[0], each[1][:best]) for each in self.prompt_logprobs[prompt]]
        return choice.echo(self.prompts[prompt].tolist(), scores)

    def _end(self, index: int, choice: ChoiceText, reason: str, piece: TextPiece) -> None:
        self._sink.end(index, _joined(piece, choice.finish(reason)), choice)


def _plain(logprobs: Logprobs | None) -> Sequence[Logprob]:
    return [(logprob, tuple(top)) for logprob, top in logprobs] if logprobs else ()


def _joined(first: TextPiece, second: TextPiece) -> TextPiece:
    if not first.text and not first.tokens:
        return second
    return TextPiece(first.text + second.text, first.tokens + second.tokens)
