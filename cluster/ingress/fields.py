"""The fields that `/v1/completions` and `/v1/chat/completions` share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from ranklet.cluster.ingress.constraint_fields import ConstraintFields
from ranklet.cluster.ingress.prompts import TextPrompts, truncation_of
from ranklet.cluster.ingress.protocol import describe_value
from ranklet.cluster.text.stops import StopStrings
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer import TruncationSide

MAX_STOPS: Final = 16
_MAX_ID_CHARS = 128
_MAX_SALT_CHARS = 1024
MAX_LISTED_TOKENS: Final = 1 << 20  # more than any vocabulary has
TokenList = Annotated[list[int], Field(max_length=MAX_LISTED_TOKENS, fail_fast=True)]


class StreamOptions(BaseModel):
    """`stream_options`. Unknown options, such as `include_obfuscation`, do not change the text."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


@dataclass(frozen=True)
class TextOptions:
    """Settings of a request that apply after its tokens are drawn: stop strings, and the contents of the answer.

    Attributes:
        end_ids: ids of the request that end a text.
        ignores_ends: whether the model's own ids do not end a text.
        echoes: whether each text begins with its prompt.
        drops_output: whether the texts have no generated tokens, since only the echo is wanted.
        shows_logprobs: whether the answer has the logprobs of the tokens.
        shows_prompt_logprobs: whether the answer has those of the prompt apart from the text, as vLLM's has.
        shows_ids: whether the answer has token ids.
        names_ids: whether logprobs name tokens by their ids.
        usage_at_end: whether a stream ends with the usage.
        usage_always: whether each chunk of a stream has the usage so far.
    """

    stops: StopStrings | None
    end_ids: frozenset[int]
    ignores_ends: bool
    includes_stop: bool
    skips_special: bool
    echoes: bool
    drops_output: bool
    shows_logprobs: bool
    shows_prompt_logprobs: bool
    shows_ids: bool
    names_ids: bool
    streams: bool
    usage_at_end: bool
    usage_always: bool

    @property
    def keeps_tokens(self) -> bool:
        return self.shows_logprobs or self.shows_ids

    @property
    def waits_for_prompt_logprobs(self) -> bool:
        """Whether the texts begin with logprobs of the prompt, which arrive with the whole answer only."""
        return self.echoes and self.shows_logprobs


class TextFields(ConstraintFields):
    """Fields of a text request. Null means not given."""

    model: str | None = None
    lora_path: str | None = None  # SGLang's field for the adapter
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: TokenList | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenList | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=_MAX_SALT_CHARS)] | None = None
    prompt_logprobs: int | None = None
    request_id: Annotated[str, Field(max_length=_MAX_ID_CHARS)] | None = None
    rid: Annotated[str, Field(max_length=_MAX_ID_CHARS)] | None = None  # SGLang's field for request_id

    def checked_params(
        self, vocab: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> GenerateParams:
        """Return the parameters of the texts.

        Raises:
            InvalidRequest: a field is out of range, or contradicts another.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                f"best_of: expected the value of n, which is {self.n or 1}, got {self.best_of}. Leave it out and "
                "choose among n answers",
                param="best_of",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: expected null while stream is not true. Set stream to true, or leave it out",
                param="stream_options",
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                f"prompt_logprobs: expected null in a stream, got {self.prompt_logprobs}. Set stream to false",
                param="prompt_logprobs",
            )
        given = {
            "top_k": self.top_k, "temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p,
            "presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty, "min_tokens": self.min_tokens, "seed": self.seed,
            "ignore_eos": self.ignore_eos, "n": self.n, "cache_salt": self.cache_salt,
        }  # fmt: skip
        params = GenerateParams(
            max_tokens=max_tokens,
            logit_bias=_biases(self.logit_bias or {}),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        params.check(vocab)
        return params

    def prompt_rules(
        self, limits: RequestLimits, param: str, max_tokens: int, *, adds_special_tokens: bool, is_limited: bool
    ) -> TextPrompts:
        """Return the rules for the prompts. Raises InvalidRequest.

        Args:
            max_tokens: see `TextPrompts`, as for the others.
        """
        longest = limits.max_model_len - max_tokens
        # As in vLLM, a text continues the end of its prompt, so the beginning is removed.
        truncation = truncation_of(self.truncate_prompt_tokens, self.truncation_side, longest, "left")
        return TextPrompts(limits, param, adds_special_tokens, max_tokens, is_limited, truncation)

    def text_options(self, *, echoes: bool = False, drops_output: bool = False, logprobs: bool) -> TextOptions:
        """Return the options of the texts. Raises InvalidRequest."""
        stops = _stops(self.stop)
        options = self.stream_options or StreamOptions()
        return TextOptions(
            stops=StopStrings(stops) if stops else None,
            end_ids=frozenset(self.stop_token_ids or ()),
            ignores_ends=bool(self.ignore_eos),
            includes_stop=bool(self.include_stop_str_in_output),
            skips_special=self.skip_special_tokens is not False,
            echoes=echoes,
            drops_output=drops_output,
            shows_logprobs=logprobs,
            shows_prompt_logprobs=self.prompt_logprobs is not None,
            shows_ids=bool(self.return_token_ids),
            names_ids=bool(self.return_tokens_as_token_ids),
            streams=bool(self.stream),
            usage_at_end=bool(options.include_usage),
            usage_always=bool(options.continuous_usage_stats),
        )


def _stops(stop: str | Sequence[str] | None) -> Sequence[str]:
    stops = [stop] if isinstance(stop, str) else stop or ()
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"stop: expected at most {MAX_STOPS} strings, got {len(stops)}. Send those that end most texts",
            param="stop",
        )
    return stops


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for token in biases:
        if not (token.isdecimal() and token.isascii() and len(token) <= 10):
            raise InvalidRequest(
                f"logit_bias: expected token ids as keys, got {describe_value(token)}. POST /tokenize returns the ids "
                "of a text",
                param="logit_bias",
            )
    return tuple((int(token), bias) for token, bias in biases.items())
