"""A gateway whose model writes a given text, and requests that offer it tools."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranklet.cluster.message import InferenceCall
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.grammar.grammar import Grammar
from tests.cluster.ingress.text_parts import LIMITS, AsgiCall, DescribingReplica, TextParts
from tests.cluster.ingress.text_replica import reply
from tests.cluster.text_client import CHAT, events_of

HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ documents or '' }}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ message.tool_call_id }}{% endfor %}{{ add_generation_prompt }}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call>'
USER = {"role": "user", "content": "Add."}


class WritingGateway:
    """Makes gateways whose model writes a text, token by token. `stop` ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[TextParts] = []

    def __call__(self, written: str = "Hello", template: str = HERMES, **given: Any) -> TextParts:
        async def write(replica: Any, call: InferenceCall[GenerateParams]) -> Any:
            tokens = parts.texts.tokens.backend.encode(f"{written}<s>", add_special_tokens=False).ids
            replica.begin(call.number)
            for i, token in enumerate(tokens):
                replica.send((call.number, 0, i, (token,), None))
            await asyncio.sleep(0)
            return reply(tokens)

        limits = replace(LIMITS, max_model_len=5000)
        replica = DescribingReplica(*[write] * 20)
        parts = TextParts(self._folder, replica, template=template, request_limits=limits, **given)
        self._made.append(parts)
        return parts

    def stop(self) -> None:
        for parts in self._made:
            parts.replicas.feeds.stop()
            parts.texts.checks.checker.stop()


async def whole(parts: TextParts, **fields: Any) -> dict[str, Any]:
    answer = await parts.http_post(CHAT, {"model": "base", "messages": [USER], "max_tokens": 2000, **fields})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return dict(choice)


async def streamed(parts: TextParts, **fields: Any) -> list[dict[str, Any]]:
    call = AsgiCall(parts.app, CHAT, {"messages": [USER], "max_tokens": 2000, **fields})
    await call.run()
    return [event["choices"][0] for event in events_of(call.body)]


async def refusal(parts: TextParts, **fields: Any) -> dict[str, Any]:
    answer = await parts.http_post(CHAT, {"model": "base", "messages": [USER], "max_tokens": 2000, **fields})
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


def grammar_of(parts: TextParts) -> Grammar | None:
    return parts.replica.calls[-1].params.grammar


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the deltas of a choice to a message, as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for choice in choices:
        delta = choice["delta"]
        message["content"] += delta.get("content", "")
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({name: call[name] for name in ("id", "type", "function")})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message
