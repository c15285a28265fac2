"""HTTP handlers of `/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's format."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.chat import MESSAGES_SCHEMA, chat_prompt
from ranklet.cluster.ingress.intake import Inputs, Intake
from ranklet.cluster.ingress.known_fields import (
    DETOKENIZE_FIELDS,
    IGNORED_HEADER,
    TOKENIZE_FIELDS,
    KnownFields,
    ignored_value,
)
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.prompts import TextPrompts
from ranklet.cluster.ingress.protocol import Form, TokenIds, parse_object, validate
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.texts import OwnedTemplate, TextModels
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.tokenizer_files import TOKENIZER_CONFIG_FILE, UnusableTokenError, read_tokenizer_file


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


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    tokens: list[int]


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
        with self.admission.admit():
            body = await read_body(request, self.limits.max_body_bytes, self.limits.body_timeout_s)
            engine_limits = await self.replicas.limits()
            form, ignored = await self.intake.on_thread(partial(_parse, body, TokenizeRequest, TOKENIZE_FIELDS))
            tokens = await self._tokens(key, form, engine_limits, len(body))
        strings = [self.texts.tokenizer.id_to_token(token) for token in tokens] if form.return_token_strs else None
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": engine_limits.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            },
            headers=ignored,
        )

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids, with the special tokens."""
        key = self.keys.authenticate(request.headers)
        with self.admission.admit():
            body = await read_body(request, self.limits.max_body_bytes, self.limits.body_timeout_s)
            vocab = (await self.replicas.limits()).vocab
            text, ignored = await self.intake.on_thread(partial(self._detokenize, key, body, vocab))
        return json_response({"prompt": text}, headers=ignored)

    async def tokenizer_info(self, request: Request) -> Response:
        """Return the tokenizer's configuration, and the chat template of the model in the query `model`."""
        key = self.keys.authenticate(request.headers)
        limits = await self.replicas.limits()
        adapter = await self.intake.on_thread(partial(self._resolve, key, request.query_params.get("model"), None))
        template = await self._template(adapter, limits)
        config = await self.intake.on_thread(self._config)
        source = None if template is None else template.source
        return json_response(config | self.texts.special_tokens | {"chat_template": source})

    async def _tokens(
        self, key: ApiKey | None, form: TokenizeRequest, limits: RequestLimits, body_bytes: int
    ) -> list[int]:
        adapter = await self.intake.on_thread(partial(self._resolve, key, form.model, form.lora_path))
        if (form.prompt is None) == (form.messages is None):
            raise InvalidRequest("prompt: expected either prompt or messages, got both or none", param="prompt")
        if form.prompt is not None:
            text, param, adds_special_tokens = form.prompt, "prompt", form.add_special_tokens is not False
        else:
            text = await self._chat(adapter, form, limits, body_bytes)
            param, adds_special_tokens = "messages", bool(form.add_special_tokens)
        rules = TokenizedTexts(limits, param, adds_special_tokens, 1, is_limited=False)
        inputs = Inputs([text], rules)
        inputs = await self.intake.on_thread(partial(self.intake.tokenise_if_small, inputs, body_bytes))
        tokens: list[int] = (await self.intake.tokenise(inputs, key.name if key else ""))[0].tolist()
        return tokens

    async def _chat(
        self, adapter: AdapterLocation | None, form: TokenizeRequest, limits: RequestLimits, body_bytes: int
    ) -> str:
        template = await self._template(adapter, limits)
        if template is None:
            raise InvalidRequest("messages: expected a model with a chat template, got none", param="messages")
        quick = template.quick_for(body_bytes)
        render = partial(
            chat_prompt, quick or template.bounded, form.messages, form.chat_template_kwargs,
            form.add_generation_prompt, form.continue_final_message,
        )  # fmt: skip
        return await (self.intake.on_thread(render) if quick else template.renderer.run(render))

    async def _template(self, adapter: AdapterLocation | None, limits: RequestLimits) -> OwnedTemplate | None:
        model = self.texts.known(adapter, limits)
        if model is None and adapter is not None:
            model = await self.texts.describe(adapter, limits)
        return None if model is None else model.template

    def _resolve(self, key: ApiKey | None, model: str | None, lora_path: str | None) -> AdapterLocation | None:
        adapter = self.names.resolve(model, lora_path) if model or lora_path else None
        self.keys.authorize(key, *self.names.names_of(adapter.name if adapter else self.names.base))
        return adapter

    def _detokenize(self, key: ApiKey | None, body: bytes, vocab: int) -> tuple[str, dict[str, str]]:
        form, ignored = _parse(body, DetokenizeRequest, DETOKENIZE_FIELDS)
        self._resolve(key, form.model, None)
        for token in form.tokens:
            if not 0 <= token < vocab:
                raise InvalidRequest(f"tokens: expected token ids from 0 to {vocab - 1}, got {token}", param="tokens")
        return str(self.texts.tokenizer.decode(form.tokens, skip_special_tokens=False)), ignored

    def _config(self) -> dict[str, Any]:
        try:
            config = read_tokenizer_file(self.texts.model_dir / TOKENIZER_CONFIG_FILE)
        except UnusableTokenError as error:
            raise ModelError(str(error)) from error
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | config


def _parse(body: bytes, form: type[Form], known: KnownFields) -> tuple[Form, dict[str, str]]:
    """Return the form of a body, and the header that names ignored fields. Raises InvalidRequest."""
    fields = parse_object(body)
    ignored = known.check(fields, form.model_fields)
    return validate(fields, form), {IGNORED_HEADER: ignored_value(ignored)} if ignored else {}


@dataclass(frozen=True)
class TokenizedTexts(TextPrompts):
    """Rules for texts that are only tokenised: any length that the size of a body allows."""

    @property
    def longest(self) -> int:
        return sys.maxsize

    def check(self, prompts: TokenIds) -> None:
        pass
