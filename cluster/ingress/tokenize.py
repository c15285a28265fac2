"""HTTP handlers of `/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's format."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.fields import TokenList
from ranklet.cluster.ingress.intake import Inputs, Intake
from ranklet.cluster.ingress.known_fields import (
    DETOKENIZE_FIELDS,
    IGNORED_HEADER,
    TOKENIZE_FIELDS,
    KnownFields,
    ignored_value,
)
from ranklet.cluster.ingress.messages import MESSAGES_SCHEMA, parse_messages
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.prompts import TextPrompts
from ranklet.cluster.ingress.protocol import Form, TokenIds, parse_object, validate
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.sender import sender_of
from ranklet.cluster.ingress.texts import DescribedModel, TextModels
from ranklet.cluster.ingress.tool_fields import TOOLS_SCHEMA, parse_tools
from ranklet.cluster.text.template import ChatTemplate
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.tokenizer_files import TOKENIZER_CONFIG_FILE, UnusableTokenError, read_tokenizer_file

_LONGEST_TEXT_TOKENS: Final = 1 << 18  # or the longest prompt, if it is longer
_BYTES_PER_TOKEN: Final = 4


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`: a prompt, or the messages of a chat."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    lora_path: str | None = None
    prompt: str | None = None
    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None

    def chat_prompt(self, template: ChatTemplate) -> str:
        """Return the prompt of a chat. Blocks. Raises InvalidRequest."""
        return template.prompt(
            parse_messages(self.messages),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            tools=[tool.shown for tool in parse_tools(self.tools)] or None,
            arguments=self.chat_template_kwargs,
        )


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    tokens: TokenList


@dataclass(frozen=True)
class TokenizeApi:
    """Handlers that tokenise prompts as text requests do. A request without `model` means the base model."""

    limits: LimitsConfig
    keys: ApiKeys
    admission: Admission
    names: ModelNames
    intake: Intake
    replicas: ReplicasClient
    texts: TextModels

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a prompt or a chat."""
        key = self.keys.authenticate(request.headers)
        owner = sender_of(key, request)
        with self.admission.admit(), self.intake.room.share(owner) as share:
            body = await read_body(request, self.limits.max_body_bytes, self.limits.body_timeout_s, share)
            limits, body_bytes = await self.replicas.limits(), len(body)
            parse = partial(self._parse_prompt, key, body)
            del body
            form, ignored, adapter = await self.intake.in_turn(owner, body_bytes, parse)
            del parse
            model = await self._model(adapter, limits)
            tokens = await self._tokens(owner, form, model, limits, body_bytes)
            backend = model.tokens.backend if form.return_token_strs else None
            render = partial(_tokens_answer, tokens, limits, ignored, backend)
            return await self.intake.in_turn(owner, body_bytes, render)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids, with the special tokens."""
        key = self.keys.authenticate(request.headers)
        owner = sender_of(key, request)
        with self.admission.admit(), self.intake.room.share(owner) as share:
            body = await read_body(request, self.limits.max_body_bytes, self.limits.body_timeout_s, share)
            limits, body_bytes = await self.replicas.limits(), len(body)
            parse = partial(self._parse_tokens, key, body)
            del body
            form, ignored, adapter = await self.intake.in_turn(owner, body_bytes, parse)
            del parse
            model = await self._model(adapter, limits)
            return await self.intake.in_turn(owner, body_bytes, partial(_detokenize, form, model, limits, ignored))

    async def tokenizer_info(self, request: Request) -> Response:
        """Return the tokenizer's configuration, and the chat template of the model in the query `model`."""
        key = self.keys.authenticate(request.headers)
        limits = await self.replicas.limits()
        adapter = await self.intake.on_thread(partial(self._resolve, key, request.query_params.get("model"), None))
        model = await self._model(adapter, limits)
        config = await self.intake.on_thread(self._config)
        source = None if model.template is None else model.template.source
        return json_response({**config, **model.special_tokens, "chat_template": source})

    def _parse_prompt(
        self, key: ApiKey | None, body: bytes
    ) -> tuple[TokenizeRequest, dict[str, str], AdapterLocation | None]:
        form, ignored = _parse(body, TokenizeRequest, TOKENIZE_FIELDS)
        adapter = self._resolve(key, form.model, form.lora_path)
        if (form.prompt is None) == (form.messages is None):
            raise InvalidRequest("prompt: expected either prompt or messages, got both or none", param="prompt")
        return form, ignored, adapter

    async def _tokens(
        self, owner: str, form: TokenizeRequest, model: DescribedModel, limits: RequestLimits, body_bytes: int
    ) -> NDArray[np.int32]:
        if form.prompt is not None:
            text, param, adds_special_tokens = form.prompt, "prompt", form.add_special_tokens is not False
        else:
            text = await self._chat(owner, model, form, body_bytes)
            param, adds_special_tokens = "messages", bool(form.add_special_tokens)
        rules = TokenizedTexts(limits, param, adds_special_tokens, 1, is_limited=False)
        rules.check_size(text)
        inputs = Inputs([text], rules, model.tokens.tokenizer)
        inputs = await self.intake.in_turn(
            owner, body_bytes, partial(self.intake.tokenise_if_small, inputs, body_bytes)
        )
        return (await self.intake.tokenise(inputs, owner))[0]

    async def _chat(self, owner: str, model: DescribedModel, form: TokenizeRequest, body_bytes: int) -> str:
        template = model.template
        if template is None:
            raise InvalidRequest("messages: expected a model with a chat template, got none", param="messages")
        quick = template.quick_for(body_bytes)
        render = partial(form.chat_prompt, quick or template.bounded)
        return await (self.intake.on_thread(render) if quick else template.renderer.run(owner, render))

    async def _model(self, adapter: AdapterLocation | None, limits: RequestLimits) -> DescribedModel:
        model = self.texts.known(adapter, limits)
        if model is None:
            assert adapter is not None, "the base model is known"
            model = await self.texts.describe(adapter, limits)
        return model

    def _resolve(self, key: ApiKey | None, model: str | None, lora_path: str | None) -> AdapterLocation | None:
        return self.names.resolve(key, model if model or lora_path else self.names.base, lora_path)

    def _parse_tokens(
        self, key: ApiKey | None, body: bytes
    ) -> tuple[DetokenizeRequest, dict[str, str], AdapterLocation | None]:
        form, ignored = _parse(body, DetokenizeRequest, DETOKENIZE_FIELDS)
        return form, ignored, self._resolve(key, form.model, None)

    def _config(self) -> dict[str, Any]:
        try:
            config = read_tokenizer_file(self.texts.model_dir / TOKENIZER_CONFIG_FILE)
        except UnusableTokenError as error:
            raise ModelError(str(error)) from error
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | config


def _tokens_answer(tokens: NDArray[np.int32], limits: RequestLimits, headers: dict[str, str], backend: Any) -> Response:
    """Return the answer to a request; with the texts of tokens if there is a tokenizer."""
    ids = tokens.tolist()
    names = None if backend is None else [backend.id_to_token(token) for token in ids]
    content = {"count": len(ids), "max_model_len": limits.max_model_len, "tokens": ids, "token_strs": names}
    return json_response(content, headers=headers)


def _detokenize(
    form: DetokenizeRequest, model: DescribedModel, limits: RequestLimits, headers: dict[str, str]
) -> Response:
    vocab = model.tokens.limits(limits).vocab
    for token in form.tokens:
        if not 0 <= token < vocab:
            raise InvalidRequest(f"tokens: expected token ids from 0 to {vocab - 1}, got {token}", param="tokens")
    text = model.tokens.backend.decode(form.tokens, skip_special_tokens=False)
    return json_response({"prompt": text}, headers=headers)


def _parse(body: bytes, form: type[Form], known: KnownFields) -> tuple[Form, dict[str, str]]:
    """Return the form of a body, and the header that names ignored fields. Raises InvalidRequest."""
    fields = parse_object(body)
    ignored = known.check(fields, form.model_fields)
    return validate(fields, form), {IGNORED_HEADER: ignored_value(ignored)} if ignored else {}


@dataclass(frozen=True)
class TokenizedTexts(TextPrompts):
    """Rules for texts that are only tokenised. They may be longer than a prompt."""

    def check_size(self, text: str) -> None:
        """Raise InvalidRequest if a text is too long to be tokenised."""
        most = _BYTES_PER_TOKEN * max(_LONGEST_TEXT_TOKENS, self.limits.max_model_len)
        if len(text) > most or len(text) * 4 > most < len(text.encode(errors="surrogatepass")):
            raise InvalidRequest(
                f"{self.param}: expected a text of at most {most} bytes, got more. Split it", param=self.param
            )

    @property
    def longest(self) -> int:
        return sys.maxsize

    def check(self, prompts: TokenIds) -> None:
        pass
