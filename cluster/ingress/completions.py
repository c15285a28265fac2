"""The body of `POST /v1/completions`, OpenAI's completions API with vLLM's fields."""

from typing import Annotated, Any, Final

from pydantic import Field, WithJsonSchema

from ranklet.cluster.ingress.fields import TextFields, TextOptions
from ranklet.cluster.ingress.protocol import INPUT_SCHEMA, Texts, TokenIds, parse_input
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest

_DEFAULT_MAX_TOKENS: Final = 16
_ECHO: Final = (
    "Begin each text with its prompt. The logprobs of a prompt are known when its texts are whole, so a stream with "
    "echo and logprobs begins then."
)


class CompletionsRequest(TextFields):
    """Body of `POST /v1/completions`. `known_fields` has the names of fields that are refused or ignored."""

    prompt: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    max_tokens: int | None = None
    echo: Annotated[bool | None, Field(description=_ECHO)] = None
    logprobs: int | None = None

    def params(self, vocab: int) -> GenerateParams:
        """Return the checked parameters. Raises InvalidRequest."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens: expected at least 1 without echo, got 0. Set echo to true to get the prompt only",
                param="max_tokens",
            )
        scored = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            scored = max(self.logprobs, scored or 0)
        # A token is made and dropped if none is wanted, since the logprobs of the prompt come with it.
        wanted = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.checked_params(vocab, wanted or 1, self.logprobs, scored)

    def options(self) -> TextOptions:
        return self.text_options(
            echoes=bool(self.echo), drops_output=self.max_tokens == 0, logprobs=self.logprobs is not None
        )

    def prompts(self, max_texts: int) -> Texts | TokenIds:
        return parse_input(self.prompt, max_texts, "prompt")
