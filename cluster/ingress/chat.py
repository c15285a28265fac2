"""The body of `POST /v1/chat/completions`, OpenAI's chat API with vLLM's fields."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, WithJsonSchema

from ranklet.cluster.ingress.fields import TextFields, TextOptions
from ranklet.cluster.ingress.protocol import describe_value
from ranklet.cluster.text.template import ChatTemplate
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
TOP_LOGPROBS: Final = 20
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_OR_PARTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "null"},
        {
            "type": "array",
            "items": {
                "type": "object", "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}  # fmt: skip
MESSAGES_SCHEMA: Final = {
    "type": "array", "minItems": 1,
    "items": {
        "type": "object", "required": ["role"],
        "properties": {"role": {"enum": list(ROLES)}, "content": _TEXT_OR_PARTS},
    },
}  # fmt: skip


class ChatRequest(TextFields):
    """Body of `POST /v1/chat/completions`. `known_fields` has the names of fields that are refused or ignored."""

    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Return the limit on generated tokens; None for the rest of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def params(self, vocab: int, rest_of_context: int) -> GenerateParams:
        """Return the checked parameters.

        Args:
            rest_of_context: limit on generated tokens if the request has none.

        Raises:
            InvalidRequest: a field is out of range, or contradicts another.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs: expected null while logprobs is not true, got {self.top_logprobs}. Set logprobs too",
                param="top_logprobs",
            )
        wanted = self.wanted_tokens
        if wanted is not None and wanted < 1:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequest(f"{name}: expected at least 1, got {wanted}", param=name)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        limit = rest_of_context if wanted is None else wanted
        return self.checked_params(vocab, limit, logprobs, self.prompt_logprobs)

    def options(self) -> TextOptions:
        return self.text_options(logprobs=bool(self.logprobs))

    def prompt(self, template: ChatTemplate) -> str:
        """Return the prompt that a template makes of the messages. Blocks. Raises InvalidRequest."""
        return chat_prompt(
            template, self.messages, self.chat_template_kwargs, self.add_generation_prompt, self.continue_final_message,
            self.reasoning_effort,
        )  # fmt: skip


def chat_prompt(
    template: ChatTemplate, messages: Any, arguments: Mapping[str, Any] | None, add_generation_prompt: bool | None,
    continue_final_message: bool | None, reasoning_effort: str | None = None,
) -> str:  # fmt: skip
    """Return the prompt of a chat. Blocks. Raises InvalidRequest."""
    arguments = dict(arguments or {})
    if reasoning_effort is not None:
        if not template.reads("reasoning_effort"):
            raise InvalidRequest(
                "reasoning_effort: expected null, since the chat template does not read it, got "
                f"{describe_value(reasoning_effort)}. Leave it out",
                param="reasoning_effort",
            )
        arguments["reasoning_effort"] = reasoning_effort
    return template.prompt(
        parse_messages(messages),
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        arguments=arguments,
    )


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """Check the messages of a chat, and join the text parts of each. Raises InvalidRequest."""
    if not isinstance(messages, list) or not messages:
        raise _bad_messages("", f"expected a list of at least one message, got {describe_value(messages)}")
    return [_parse_message(f"[{index}]", message) for index, message in enumerate(messages)]


def _parse_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _bad_messages(where, f"expected an object with role and content, got {describe_value(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad_messages(f"{where}.role", f"expected one of {', '.join(ROLES)}, got {describe_value(role)}")
    if isinstance(content, list):
        parts = [_parse_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)]
        return {**message, "content": "\n".join(parts)}
    if not isinstance(content, str) and (content is not None or role != "assistant"):
        raise _bad_messages(f"{where}.content", f"expected a text or text parts, got {describe_value(content)}")
    return message


def _parse_part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        raise _bad_messages(
            where,
            f"expected a part of type text, got {describe_value(part if kind is None else kind)}. The model reads text",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise _bad_messages(f"{where}.text", f"expected a text, got {describe_value(text)}")
    return text


def _bad_messages(where: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"messages{where}: {reason}", param="messages")
