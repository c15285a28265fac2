"""Answers of `/v1/chat/completions`, whole and in chunks: reasoning, content and calls of tools."""

import secrets
import string
from collections.abc import Sequence
from typing import Any, Final

from ranklet.cluster.ingress.fields import TextOptions
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.ingress.text_format import ChunkKind, WholeText, ends_of
from ranklet.cluster.text.answer import AnswerParts, AnswerPiece, SplitAnswer
from ranklet.cluster.text.choice import ChoiceText, TextPiece, TokenRecord
from ranklet.cluster.text.frames import chat_choice, role_choice
from ranklet.cluster.text.logprobs import LogprobsFormat
from ranklet.cluster.text.tool_calls import CallPiece

_ID_LETTERS: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9  # templates of Mistral's models accept no other


class ChatFormat:
    """The format of `/v1/chat/completions`.

    Args:
        parts: what each answer may consist of.
    """

    kind = "chat.completion"
    chunk_kind: ChunkKind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, options: TextOptions, logprobs: LogprobsFormat, prompts: TokenIds, parts: AnswerParts) -> None:
        self._options = options
        self._logprobs = logprobs
        self._prompts = prompts
        self._parts = parts
        self._answers: dict[int, SplitAnswer] = {}

    def opening(self, index: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        return role_choice(index), self._prompt_ids()

    def chunk(
        self, index: int, piece: TextPiece, choice: ChoiceText | None, *, is_first: bool
    ) -> dict[str, Any] | None:
        made, has_called = AnswerPiece(content=piece.text), False
        if not self._parts.is_content:
            answer = self._answers.setdefault(index, SplitAnswer(self._parts))
            made = answer.push(piece.text)
            if choice is not None:
                made, has_called = made.joined(answer.finish()), answer.has_called
        delta = _delta(made)
        if not delta and piece.tokens:
            delta = {"content": ""}
        if not delta and choice is None:
            return None
        rest = self._rest(piece.tokens, choice, has_logprobs=bool(piece.tokens), has_called=has_called)
        return chat_choice(index, delta, **rest)

    def whole(self, texts: Sequence[WholeText], prompt_logprobs: Sequence[Any] | None) -> dict[str, Any]:
        choices = []
        for index, each in enumerate(texts):
            answer = SplitAnswer(self._parts)
            made = answer.push("".join(each.texts)).joined(answer.finish())
            rest = self._rest(each.tokens, each.choice, has_logprobs=True, has_called=answer.has_called)
            choice = chat_choice(index, {}, **rest)
            del choice["delta"]
            choices.append({"index": index, "message": self._message(made), **choice})
        scores = {} if prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs[0]}
        return {"choices": choices, **self._prompt_ids(), **scores}

    def _message(self, made: AnswerPiece) -> dict[str, Any]:
        content = made.content if made.content or not made.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._parts.separates:
            message["reasoning_content"] = made.reasoning or None
        if made.calls:
            calls = _calls(made.calls)
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        return message

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompts[0].tolist()} if self._options.shows_ids else {}

    def _rest(
        self, tokens: Sequence[TokenRecord], choice: ChoiceText | None, *, has_logprobs: bool, has_called: bool
    ) -> dict[str, Any]:
        shows = self._options.shows_logprobs and has_logprobs
        ends = ends_of(self._options, choice)
        if has_called and ends.get("finish_reason") == "stop":
            ends["finish_reason"] = "tool_calls"
        return {
            "logprobs": self._logprobs.chat(tokens) if shows else None,
            "token_ids": [token.id for token in tokens] if self._options.shows_ids else None,
            **ends,
        }


def _delta(made: AnswerPiece) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if made.reasoning:
        delta["reasoning_content"] = made.reasoning
    if made.content:
        delta["content"] = made.content
    if made.calls:
        delta["tool_calls"] = _calls(made.calls)
    return delta


def _calls(pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """Return the pieces in OpenAI's form, those of one call joined. The first piece of a call has its id."""
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.name is not None:
            function = {"name": piece.name, "arguments": piece.arguments}
            found[piece.call] = {"index": piece.call, "id": _new_id(), "type": "function", "function": function}
        elif piece.call in found:
            found[piece.call]["function"]["arguments"] += piece.arguments
        else:
            found[piece.call] = {"index": piece.call, "function": {"arguments": piece.arguments}}
    return list(found.values())


def _new_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
