"""The text path of a gateway without Ray: a real tokenizer, and a replica that answers by a script."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ranklet.cluster.access.quota_ledger import Grant, QuotaOwner, Statement
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.chat_task import ChatTask
from ranklet.cluster.ingress.exchange import Exchange
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.text_task import CompletionsTask
from ranklet.cluster.ingress.texts import TextModels
from ranklet.cluster.message import AdapterText
from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.grammar.constraint import Constraint
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.tokenizer import Truncation, with_added
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from tests.cluster.ingress.parts import DESCRIPTION, Parts
from tests.cluster.ingress.text_replica import Script, TextReplica
from tests.cluster.text.small_tokenizers import byte_level
from tests.cluster.text_client import CHAT, COMPLETIONS

LIMITS = RequestLimits(100, 32, 400, 100, end_ids=(0,), base_revision="abcdef0123456789")


class PlainTokenizer:
    """A small tokenizer with the methods of `PromptTokenizer`."""

    def __init__(self, special: Sequence[str] = ()) -> None:
        self.backend = byte_level()
        self.backend.add_special_tokens(list(special))

    def with_added(self, added: AddedTokens) -> "PlainTokenizer":
        found = PlainTokenizer()
        found.backend = with_added(self.backend, added)
        return found

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, add_special_tokens: bool | None = None,
        truncation: Truncation | None = None,
    ) -> list[NDArray[np.int32]]:  # fmt: skip
        return self.encode_plain(texts, add_special_tokens=True, truncation=truncation)

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        found = self.backend.encode_batch(list(texts))
        if truncation is not None:
            for each in found:
                each.truncate(truncation.tokens, direction=truncation.side)
        return [np.array(each.ids, np.int32) for each in found]

    def least_tokens(self, text: str) -> int:
        return 0

    def most_characters(self, tokens: int) -> int:
        return 256 * tokens


class DescribingReplica(TextReplica):
    """Also describes itself and its adapters. `described` counts descriptions."""

    def __init__(self, *scripts: Script) -> None:
        super().__init__(*scripts)
        self.revision = "v1"
        self.described = 0
        self.template: str | None = None
        self.constraint: Constraint | None = None
        self.tool_format: str | None = None
        self.invocation: Invocation | None = None
        self.added = AddedTokens()
        self.special_tokens: dict[str, str] = {}


@dataclass
class _Describer:
    replica: DescribingReplica

    async def text_description(self, adapter: Any) -> AdapterText:
        self.replica.described += 1
        replica = self.replica
        return AdapterText(
            replica.revision, replica.template, replica.special_tokens, constraint=replica.constraint,
            tool_format=replica.tool_format, added_tokens=replica.added, invocation=replica.invocation,
        )  # fmt: skip


class TextParts(Parts):
    """A gateway for texts, and an HTTP client for it."""

    def __init__(self, folder: Path, replica: DescribingReplica, **given: Any) -> None:
        limits = LimitsConfig.model_validate(given.pop("limits", {}))
        super().__init__(folder, limits, given.pop("keys", {}))
        self.replica = replica
        affinity = Affinity()
        affinity.set_members([Member("r0", 0)])
        handle: Any = _WithLimits(replica, given.pop("request_limits", LIMITS))
        self.replicas = replicas = ReplicasClient(handle, affinity, limits, lambda continues: None, "gateway")
        tokenizer: Any = PlainTokenizer(given.pop("special", ()))
        model_dir = folder / "model"
        model_dir.mkdir()
        (model_dir / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
        template = given.pop("template", "{{ messages[0].content }}{{ add_generation_prompt }}")
        (model_dir / "chat_template.jinja").write_text(template)
        self.texts = TextModels(tokenizer, model_dir, _Describer(replica), given.pop("text", None))
        self.services = replace(self.services, replicas=replicas, intake=Intake(tokenizer, limits))
        tasks = {COMPLETIONS: CompletionsTask, CHAT: ChatTask}
        self.app = Starlette(routes=[self._route(path, task) for path, task in tasks.items()])

    def close(self) -> None:
        """Close the feeds, and end the process that checks grammars."""
        self.replicas.feeds.stop()
        self.texts.checks.checker.stop()

    async def spent(self) -> float:
        """Return the tokens that were charged to quotas since the last call."""
        self._charged = 0.0
        await self.quotas.sync()
        return self._charged

    async def _settle(self, statements: Mapping[QuotaOwner, Statement]) -> Mapping[QuotaOwner, Grant]:
        self._charged = sum(each.spent for each in statements.values())
        return await super()._settle(statements)

    async def http_post(self, path: str, fields: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30) as client:
            return await client.post(path, json=fields)

    def _route(self, path: str, task: Any) -> Route:
        async def answer(request: Request) -> Response:
            return await Exchange(self.services, partial(task.parse, self.texts), request).answer()

        return Route(path, answer, methods=["POST"])


class _WithLimits:
    """Adds the method `describe` to a scripted replica."""

    def __init__(self, replica: DescribingReplica, limits: RequestLimits) -> None:
        self._replica = replica
        self._limits = limits

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        return self if method_name == "describe" else self._replica.options(method_name=method_name, stream=stream)

    async def remote(self, *arguments: Any, **kwargs: Any) -> Any:
        return replace(DESCRIPTION, limits=self._limits)


class AsgiCall:
    """One streamed request to an ASGI app, whose client reads at its own pace.

    Attributes:
        sent: messages that the client has read.
    """

    def __init__(self, app: Any, path: str, fields: dict[str, Any], key: str | None = None) -> None:
        self._app = app
        self._body = json.dumps({"model": "base", "stream": True, **fields}).encode()
        self._path = path
        self._key = key
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._received = False

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self) -> None:
        headers = [(b"authorization", f"Bearer {self._key}".encode())] if self._key else []
        scope = {
            "type": "http", "method": "POST", "path": self._path, "headers": headers, "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1), "root_path": "",
        }  # fmt: skip
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._received:
            await asyncio.Event().wait()
        self._received = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
