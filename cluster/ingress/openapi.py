"""The OpenAPI description of the HTTP API, built from the pydantic models that check request bodies."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pydantic import BaseModel

from ranklet.cluster.ingress.chat import ChatRequest
from ranklet.cluster.ingress.classify import ClassifyRequest
from ranklet.cluster.ingress.completions import CompletionsRequest
from ranklet.cluster.ingress.embeddings import EmbeddingsRequest
from ranklet.cluster.ingress.fields import StreamOptions
from ranklet.cluster.ingress.lifecycle import LoadRequest, UnloadRequest
from ranklet.cluster.ingress.rerank import RerankRequest, ScoreRequest
from ranklet.cluster.ingress.tokenize import DetokenizeRequest, TokenizeRequest

_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_OBJECT: dict[str, Any] = {"type": "object"}


def _record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(item: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    return _record(object={"const": "list"}, data={"type": "array", "items": item}, **more)


_MAYBE_OBJECT = {"type": ["object", "null"]}
_FINISH = {"enum": ["stop", "length"]}
_CALL = _record(id=_TEXT, type={"const": "function"}, function=_record(name=_TEXT, arguments=_TEXT))
_MESSAGE = _record(role={"const": "assistant"}, content=_MAYBE_TEXT)
_MESSAGE["properties"] |= {"reasoning_content": _MAYBE_TEXT, "tool_calls": {"type": "array", "items": _CALL}}
_USAGE = _record(
    prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER,
    prompt_tokens_details=_record(cached_tokens=_NUMBER),
)  # fmt: skip


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _record(
        id=_TEXT, object={"const": kind}, created=_NUMBER, model=_TEXT, system_fingerprint=_TEXT,
        choices={"type": "array", "items": choice}, usage={"$ref": "#/components/schemas/Usage"},
    )  # fmt: skip


_VECTOR = {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string", "contentEncoding": "base64"}]}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _record(error=_record(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_TEXT)),
    "Embeddings": _record(
        object={"const": "list"}, model=_TEXT,
        data={"type": "array", "items": _record(object={"const": "embedding"}, index=_NUMBER, embedding=_VECTOR)},
        usage=_record(prompt_tokens=_NUMBER, total_tokens=_NUMBER),
    ),
    "Classes": _record(
        id=_TEXT, object={"const": "list"}, created=_NUMBER, model=_TEXT,
        data={
            "type": "array",
            "items": _record(
                index=_NUMBER, label=_TEXT, probs={"type": "array", "items": {"type": "number"}}, num_classes=_NUMBER
            ),
        },
        usage=_record(prompt_tokens=_NUMBER, total_tokens=_NUMBER),
    ),
    "Ranking": _record(
        id=_TEXT, model=_TEXT, usage=_record(prompt_tokens=_NUMBER, total_tokens=_NUMBER),
        results={"type": "array", "items": _record(index=_NUMBER, relevance_score={"type": "number"})},
    ),
    "Scores": _record(
        id=_TEXT, object={"const": "list"}, created=_NUMBER, model=_TEXT,
        data={"type": "array", "items": _record(index=_NUMBER, object={"const": "score"}, score={"type": "number"})},
        usage=_record(prompt_tokens=_NUMBER, total_tokens=_NUMBER),
    ),
    "Card": _record(
        id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT, root=_TEXT, parent=_MAYBE_TEXT,
        max_model_len={"type": ["integer", "null"]},
        ranklet=_record(
            tasks={"type": "array", "items": {"enum": ["embeddings", "text"]}},
            chat_template={"enum": ["base", "adapter", None]}, vocab_size={"type": ["integer", "null"]},
        ),
    ),
    "Usage": _USAGE,
    StreamOptions.__name__: StreamOptions.model_json_schema(),
    "Completion": _answer(
        "text_completion",
        _record(
            index=_NUMBER, text=_TEXT, logprobs=_MAYBE_OBJECT, finish_reason=_FINISH,
            stop_reason={"type": ["string", "integer", "null"]},
        ),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _record(
            index=_NUMBER, message=_MESSAGE, logprobs=_MAYBE_OBJECT,
            finish_reason={"enum": [*_FINISH["enum"], "tool_calls"]},
            stop_reason={"type": ["string", "integer", "null"]},
        ),
    ),
    "Tokens": _record(
        count=_NUMBER, max_model_len=_NUMBER, tokens={"type": "array", "items": _NUMBER},
        token_strs={"type": ["array", "null"], "items": _MAYBE_TEXT},
    ),
    "Prompt": _record(prompt=_TEXT),
    "Loaded": _record(
        name=_TEXT, revision=_TEXT, rank=_NUMBER, target_modules={"type": "array", "items": _TEXT}, bytes=_NUMBER,
        state={"const": "ready"}, verified=_FLAG, pinned=_FLAG, path=_TEXT, notes={"type": "array", "items": _TEXT},
    ),
    "Adapter": _record(
        name=_TEXT, state={"enum": ["registered", "loading", "ready", "failed", "draining"]}, revision=_MAYBE_TEXT,
        path=_MAYBE_TEXT, pinned=_FLAG, rank={"type": ["integer", "null"]}, references=_NUMBER,
        replicas={"type": "array", "items": _OBJECT}, notes={"type": ["array", "null"], "items": _TEXT},
        error=_MAYBE_TEXT,
    ),
    "Unloaded": _record(name=_TEXT, state={"const": "unloaded"}),
    "Targets": {"type": "array", "items": _record(targets={"type": "array", "items": _TEXT}, labels=_OBJECT)},
}  # fmt: skip
_CARDS = _list_of({"$ref": "#/components/schemas/Card"})
_ADAPTERS = _list_of(
    {"$ref": "#/components/schemas/Adapter"},
    refused_settings={
        "type": "array",
        "items": _record(setting=_TEXT, role=_TEXT, reason=_TEXT, processes={"type": "array", "items": _TEXT}),
    },
)

_USER = ("401", "403")
_INFER = (*_USER, "400", "404", "408", "413", "415", "429", "503")
_CHANGE = (*_USER, "400", "404", "408", "409", "413", "415", "503")
_LOAD = ("Load, replace or pin an adapter", LoadRequest, "Loaded", _CHANGE)
_UNLOAD = ("Unload an adapter", UnloadRequest, "Unloaded", _CHANGE)
_RERANK = ("Order documents by their relevance to a query, which an adapter scores", RerankRequest, "Ranking", _INFER)
_SCORE = ("Score pairs of texts by an adapter with one label", ScoreRequest, "Scores", _INFER)
_STREAMED = frozenset({"/v1/completions", "/v1/chat/completions"})
_Operation = tuple[str, type[BaseModel] | None, "str | dict[str, Any]", tuple[str, ...]]
# By path and method: summary, model of the body, schema of the answer, and statuses of refusals.
OPERATIONS: Mapping[tuple[str, str], _Operation] = {
    ("/v1/embeddings", "post"): (
        "Embed texts, or token ids, to which no end token is added; `model` names an adapter or the base model",
        EmbeddingsRequest, "Embeddings", _INFER,
    ),
    ("/v1/completions", "post"): (
        "Continue prompts, whole or as a stream; `model` names an adapter or the base model", CompletionsRequest,
        "Completion", _INFER,
    ),
    ("/v1/chat/completions", "post"): (
        "Answer the messages of a chat, whole or as a stream", ChatRequest, "ChatCompletion", _INFER,
    ),
    ("/classify", "post"): (
        "Label texts by an adapter for sequence classification", ClassifyRequest, "Classes", _INFER,
    ),
    ("/v1/rerank", "post"): _RERANK,
    ("/rerank", "post"): _RERANK,
    ("/v2/rerank", "post"): _RERANK,
    ("/score", "post"): _SCORE,
    ("/v1/score", "post"): _SCORE,
    ("/tokenize", "post"): (
        "Return the token ids of a prompt or a chat", TokenizeRequest, "Tokens",
        (*_USER, "400", "404", "408", "413", "415", "503"),
    ),
    ("/detokenize", "post"): (
        "Return the text of token ids", DetokenizeRequest, "Prompt", (*_USER, "400", "404", "408", "413", "415", "503"),
    ),
    ("/tokenizer_info", "get"): (
        "Return the tokenizer's configuration and the chat template", None, _OBJECT, (*_USER, "400", "404", "503"),
    ),
    ("/v1/models", "get"): ("List the base model and the adapters that the key may use", None, _CARDS, _USER),
    ("/v1/models/{name}", "get"): ("Describe one model, by any of its names", None, "Card", (*_USER, "400", "404")),
    ("/v1/adapters", "get"): ("List all adapters with their states and replicas", None, _ADAPTERS, _USER),
    ("/v1/adapters", "post"): _LOAD,
    ("/v1/load_lora_adapter", "post"): _LOAD,
    ("/load_lora_adapter", "post"): _LOAD,
    ("/v1/unload_lora_adapter", "post"): _UNLOAD,
    ("/unload_lora_adapter", "post"): _UNLOAD,
    ("/v1/adapters/{name}", "get"): ("Describe one adapter", None, "Adapter", (*_USER, "400", "404")),
    ("/v1/adapters/{name}", "delete"): ("Unload an adapter", None, "Unloaded", (*_USER, "400", "404", "409", "503")),
    ("/v1/status", "get"): ("Data of the status page", None, _OBJECT, _USER),
    ("/health", "get"): ("Check that this process is up", None, _OBJECT, ()),
    ("/ready", "get"): ("Check that a replica is ready", None, _OBJECT, ("503",)),
    ("/version", "get"): ("Installed versions and the data path", None, _OBJECT, ()),
    ("/metrics/targets", "get"): ("Metrics endpoints, for Prometheus http_sd", None, "Targets", ()),
}  # fmt: skip


def document() -> dict[str, Any]:
    """Return the description in OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for (path, method), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, method, *operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ranklet", "version": metadata.version("ranklet"),
            "description": "Serves many LoRA adapters of one base model. The message of every error names the expected "
            "value, the value received and the remedy.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "if there are keys"}},
        },
        "security": [{"key": []}, {}],
    }  # fmt: skip


def _operation(
    path: str, method: str, summary: str, form: type[BaseModel] | None, answer: str | dict[str, Any],
    refusals: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    schema = {"$ref": f"#/components/schemas/{answer}"} if isinstance(answer, str) else answer
    content = _content("the answer", schema)
    if path in _STREAMED:
        content["content"]["text/event-stream"] = {"schema": _TEXT}
    described: dict[str, Any] = {
        "operationId": f"{method}{path.replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": summary,
        "responses": {"200": content}
        | {status: _content("refused", {"$ref": "#/components/schemas/Error"}) for status in sorted(refusals)},
    }
    if "{name}" in path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    if form is not None:
        described_form = form.model_json_schema(mode="validation", ref_template="#/components/schemas/{model}")
        assert described_form.pop("$defs", {}).keys() <= _SCHEMAS.keys()
        body = _content("", described_form)
        described["requestBody"] = {"required": True, "content": body["content"]}
    return described


def _content(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
