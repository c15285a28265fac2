"""The body of `POST /v1/chat/completions`, OpenAI's chat API with vLLM's fields."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import Field, WithJsonSchema

from ranklet.cluster.ingress.fields import TextOptions
from ranklet.cluster.ingress.messages import MESSAGES_SCHEMA, parse_messages
from ranklet.cluster.ingress.protocol import describe_value
from ranklet.cluster.ingress.tool_fields import ToolFields
from ranklet.cluster.text.template import ChatTemplate
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest

TOP_LOGPROBS: Final = 20


class ChatRequest(ToolFields):
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
    separate_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None

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

    def prompt(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the prompt that a template makes of the messages. Blocks. Raises InvalidRequest."""
        arguments = self.chat_template_kwargs
        if self.reasoning_effort is not None:
            _check_read(template, "reasoning_effort", self.reasoning_effort)
            arguments = {**(arguments or {}), "reasoning_effort": self.reasoning_effort}
        if self.documents:
            _check_read(template, "documents", self.documents)
        return template.prompt(
            parse_messages(self.messages),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            tools=tools,
            documents=self.documents or None,
            arguments=arguments,
        )


def _check_read(template: ChatTemplate, name: str, value: Any) -> None:
    if not template.reads(name):
        raise InvalidRequest(
            f"{name}: expected null, since the chat template does not read it, got {describe_value(value)}. Leave it "
            "out",
            param=name,
        )
