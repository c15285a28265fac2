"""The text of one choice: its pieces, where it stops, and which tokens belong to which piece."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ranklet.cluster.text.detokenizer import Detokenizer
from ranklet.cluster.text.stops import StopScanner, StopStrings

# A token's logprob, and the ids and logprobs of the best alternatives, best first: `TokenLogprob`, or its plain tuple.
Logprob = tuple[float, tuple[tuple[int, float], ...]]


class TokenRecord(NamedTuple):
    """A token of a text.

    Attributes:
        offset: of its first character in the text.
        logprob: None if it was not asked for, and for the first token of an echoed prompt.
        top: ids and logprobs of the best alternatives, best first.
    """

    id: int
    offset: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TextPiece(NamedTuple):
    """Consecutive text of a choice, and the tokens whose text is complete with it."""

    text: str = ""
    tokens: tuple[TokenRecord, ...] = ()


NOTHING = TextPiece()


class ChoiceText:
    """The text of one choice. The pieces of a stream and the text of a whole answer are made alike, so they are equal.

    Text that may be the beginning of a stop string is held back. A token leaves with the piece that completes its text.
    A token of a stop string leaves only if some of its text is visible.

    Args:
        stops: strings that end the text; None without any.
        end_ids: tokens that end the text: those of the model, and the request's stop ids. The engine ends there too.
        include_stop: whether the stop string, or the text of the token that ends it, is part of the text.
        keeps_tokens: whether pieces have their tokens.
        min_tokens: stop strings do not count in the text of this many first tokens.

    Attributes:
        end_token: the token that ended the text.
        used_tokens: number of tokens up to the end of the text, with the token that ended it.
        finish_reason: why the text ended; None until `finish`.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: StopStrings | None = None, *, end_ids: Collection[int] = (),
        include_stop: bool = False, keeps_tokens: bool = False, min_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.end_token: int | None = None
        self.used_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = detokenizer
        self._scanner = None if stops is None else StopScanner(stops, include=include_stop)
        self._end_ids = end_ids
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._waiting: deque[tuple[TokenRecord, int]] | None = deque() if keeps_tokens else None
        self._made = 0  # characters
        self._sent = 0  # characters that have left
        self._has_ended = False

    @property
    def matched(self) -> str | None:
        """Return the stop string that ended the text."""
        return self._scanner.matched if self._scanner else None

    @property
    def has_ended(self) -> bool:
        """Whether a stop string or a token has ended the text. More tokens have no effect."""
        return self._has_ended

    def echo(self, tokens: Sequence[int], logprobs: Sequence[Logprob | None] | None = None) -> TextPiece:
        """Begin the text with the prompt, where stops do not count. The detokenizer must not know the prompt."""
        made = []
        for i, token in enumerate(tokens):
            made.append(self._detokenizer.push(token))
            if self._waiting is not None:
                self._record(token, made[-1], logprobs[i] if logprobs else None)
        return self._piece("".join(made))

    def push(self, tokens: Sequence[int], logprobs: Sequence[Logprob | None] | None = None) -> TextPiece:
        """Add tokens. Returns the text that may leave now; `NOTHING` if none may."""
        made = ""
        for i, token in enumerate(tokens):
            if self._has_ended:
                break
            self.used_tokens += 1
            shown = True
            if token in self._end_ids:
                self._has_ended, self.end_token, shown = True, token, self._include_stop
            text = self._detokenizer.push(token) if shown else self._detokenizer.finish()
            if self._waiting is not None:
                self._record(token, text, logprobs[i] if logprobs else None, shown=shown)
            made += text if self._scanner is None or self.used_tokens <= self._min_tokens else self._scan(text)
        return self._piece(made)

    def finish(self, reason: str) -> TextPiece:
        """End the text. Returns the rest of it.

        Args:
            reason: why the engine ended: stop or length. A stop string takes precedence.
        """
        made = self._detokenizer.finish()
        if self._scanner is not None:
            made = self._scan(made) + self._scanner.finish()
        self._has_ended = True
        self.finish_reason = reason if self.matched is None else "stop"
        return self._piece(made)

    def _scan(self, text: str) -> str:
        leaves = self._scanner.push(text) if self._scanner else text
        self._has_ended = self._has_ended or self.matched is not None
        return leaves

    def _record(self, token: int, text: str, logprob: Logprob | None, *, shown: bool = True) -> None:
        """Let a token wait for its text to leave. A token that ends the text without being shown stands behind it."""
        assert self._waiting is not None
        start = self._made
        self._made += len(text)
        record = TokenRecord(token, start if shown else self._made, *(logprob or ()))
        # The bytes of an incomplete character become at least one character.
        self._waiting.append((record, self._made + self._detokenizer.is_within_character))

    def _piece(self, text: str) -> TextPiece:
        self._sent += len(text)
        if not self._waiting:
            return TextPiece(text) if text else NOTHING
        is_cut, is_last = self.matched is not None, self.finish_reason is not None
        tokens = []
        while self._waiting:
            record, end = self._waiting[0]
            if not (end <= self._sent or (is_cut and record.offset < self._sent) or (is_last and not is_cut)):
                break
            tokens.append(record)
            self._waiting.popleft()
        return TextPiece(text, tuple(tokens)) if text or tokens else NOTHING
