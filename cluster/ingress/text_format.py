"""Answers with texts in the formats of OpenAI's API, whole and in chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ranklet.cluster.ingress.fields import TextOptions
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.text.choice import ChoiceText, Logprob, TextPiece, TokenRecord
from ranklet.cluster.text.frames import FinishReason, completion_choice
from ranklet.cluster.text.logprobs import MIN_LOGPROB, LogprobsFormat

ChunkKind = Literal["text_completion", "chat.completion.chunk"]


@dataclass
class WholeText:
    """A choice of a whole answer."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)
    choice: ChoiceText | None = None


class WholeTexts:
    """Collects the texts of a whole answer; implements `ranklet.cluster.ingress.generation.PieceSink`."""

    def __init__(self, count: int) -> None:
        self.texts = [WholeText() for _ in range(count)]

    def add(self, index: int, piece: TextPiece) -> None:
        self.texts[index].texts.append(piece.text)
        self.texts[index].tokens.extend(piece.tokens)

    def end(self, index: int, piece: TextPiece, choice: ChoiceText) -> None:
        self.add(index, piece)
        self.texts[index].choice = choice


class TextFormat(Protocol):
    """The format of an endpoint."""

    kind: str
    chunk_kind: ChunkKind
    id_prefix: str

    def opening(self, index: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return a choice that precedes the text of a choice, or None, and further fields of its first chunk."""

    def chunk(
        self, index: int, piece: TextPiece, choice: ChoiceText | None, *, is_first: bool
    ) -> dict[str, Any] | None:
        """Return a choice of a chunk, or None while all text is held back. `choice` is given at its end."""

    def whole(self, texts: Sequence[WholeText], prompt_logprobs: Sequence[Any] | None) -> dict[str, Any]:
        """Return the fields of a whole answer: `choices`, and others."""


class CompletionsFormat:
    """The format of `/v1/completions`.

    Args:
        n: number of choices for each prompt.
    """

    kind = "text_completion"
    chunk_kind: ChunkKind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, options: TextOptions, logprobs: LogprobsFormat, prompts: TokenIds, n: int) -> None:
        self._options = options
        self._logprobs = logprobs
        self._prompts = prompts
        self._n = n

    def opening(self, index: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        return None, {}

    def chunk(self, index: int, piece: TextPiece, choice: ChoiceText | None, *, is_first: bool) -> dict[str, Any]:
        made = self._choice(index, piece.text, piece.tokens, choice, has_logprobs=bool(piece.tokens))
        if is_first and self._options.shows_ids:
            made["prompt_token_ids"] = self._prompts[index // self._n].tolist()
        return made

    def whole(self, texts: Sequence[WholeText], prompt_logprobs: Sequence[Any] | None) -> dict[str, Any]:
        choices = []
        for index, each in enumerate(texts):
            made = self._choice(index, "".join(each.texts), each.tokens, each.choice, has_logprobs=True)
            if self._options.shows_ids:
                made["prompt_token_ids"] = self._prompts[index // self._n].tolist()
            if prompt_logprobs is not None:
                made["prompt_logprobs"] = prompt_logprobs[index // self._n]
            choices.append(made)
        return {"choices": choices}

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenRecord], choice: ChoiceText | None, *, has_logprobs: bool
    ) -> dict[str, Any]:
        shows = self._options.shows_logprobs and has_logprobs
        return completion_choice(
            index, text,
            logprobs=self._logprobs.completion(tokens) if shows else None,
            token_ids=[token.id for token in tokens] if self._options.shows_ids else None,
            **ends_of(self._options, choice),
        )  # fmt: skip


def ends_of(options: TextOptions, choice: ChoiceText | None) -> dict[str, Any]:
    """Return why a choice has ended; nothing while it goes on."""
    if choice is None:
        return {}
    reason: FinishReason = "length" if choice.finish_reason == "length" else "stop"
    stop_reason: str | int | None = choice.matched
    if stop_reason is None and choice.end_token in options.end_ids:
        stop_reason = choice.end_token
    return {"finish_reason": reason, "stop_reason": stop_reason}


def shown_prompt_logprobs(
    prompts: TokenIds, scores: Sequence[Sequence[Logprob | None]], best: int, format: LogprobsFormat
) -> list[list[Mapping[str, Any] | None]]:
    """Return the logprobs of prompts as vLLM's API shows them: by token id, with the token's text.

    Args:
        best: number of alternatives to show.
    """
    return [
        [
            None if score is None else _shown(token, score[0], score[1][:best], format)
            for token, score in zip(prompt.tolist(), each, strict=True)
        ]
        for prompt, each in zip(prompts, scores, strict=True)
    ]


def _shown(token: int, logprob: float, top: Sequence[tuple[int, float]], format: LogprobsFormat) -> Mapping[str, Any]:
    shown: dict[str, Any] = {}
    for rank, (other, value) in enumerate(top, start=1):
        shown[str(other)] = {"logprob": max(value, MIN_LOGPROB), "rank": rank, "decoded_token": format.shown(other)}
    if str(token) not in shown:
        shown[str(token)] = {"logprob": max(logprob, MIN_LOGPROB), "rank": None, "decoded_token": format.shown(token)}
    return shown
