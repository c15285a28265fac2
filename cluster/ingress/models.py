"""HTTP handlers of `/v1/models`, which describe the base model and the adapters as OpenAI's model cards."""

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.texts import TextModels
from ranklet.cluster.message import AdapterText
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import RankletError, Unavailable


@dataclass(frozen=True)
class ModelsApi:
    """Handlers that show a key the models that it may use.

    Attributes:
        model_dir: folder of the base model.
    """

    keys: ApiKeys
    names: ModelNames
    registry: Registry
    model_dir: Path
    intake: Intake
    replicas: ReplicasClient
    cards: AdapterCards
    texts: TextModels

    async def list_models(self, request: Request) -> Response:
        """List the base model and the adapters that the key may use."""
        key, limits = self.keys.authenticate(request.headers), await self._limits()
        return json_response(
            {"object": "list", "data": await self.intake.on_thread(partial(self._build_cards, key, limits))}
        )

    async def get_model(self, request: Request) -> Response:
        """Describe a model, by any name that the field `model` of a request accepts."""
        key, name = self.keys.authenticate(request.headers), request.path_params["name"]
        adapter = await self.intake.on_thread(partial(self.names.resolve, key, name))
        if adapter is not None:
            await self.cards.check_revision(adapter)
        limits = await self._limits()
        await self._describe(adapter, limits)
        return json_response(self._card(adapter, limits))

    async def _describe(self, adapter: AdapterLocation | None, limits: RequestLimits | None) -> None:
        """Let a replica describe the adapter. One that cannot be used has no template, and the base model's tasks."""
        if limits is not None and adapter is not None:
            with contextlib.suppress(RankletError):
                if self.texts.known(adapter, limits) is None:
                    await self.texts.describe(adapter, limits)

    def _build_cards(self, key: ApiKey | None, limits: RequestLimits | None) -> list[dict[str, Any]]:
        may_use_base = key is None or key.may_use(*self.names.names_of(self.names.base))
        cards = [self._card(None, limits)] if may_use_base else []
        for adapter, modified_s in self.registry.scan():
            if key is None or key.may_use(adapter.name):
                cards.append(self._card(adapter, limits, modified_s))
        return cards

    def _card(
        self, adapter: AdapterLocation | None, limits: RequestLimits | None, modified_s: int | None = None
    ) -> dict[str, Any]:
        if adapter is None:
            root, modified_s = str(self.model_dir), int(self.model_dir.stat().st_mtime)
        else:
            root, modified_s = adapter.source, adapter.modified_s() if modified_s is None else modified_s
        return {
            "id": adapter.name if adapter else self.names.base,
            "object": "model",
            "created": modified_s,
            "owned_by": "ranklet",
            "root": root,
            "parent": self.names.base if adapter else None,
            "max_model_len": None if limits is None else limits.max_model_len,
            "ranklet": self._uses(adapter, limits),
        }

    def _uses(self, adapter: AdapterLocation | None, limits: RequestLimits | None) -> dict[str, Any]:
        """Return what a model is for, whose chat template makes its prompts (base or adapter), and how many token ids
        it has.

        The template is None if there is none. In the list of all models, an adapter whose folder no request has needed
        so far has none, and the tasks of the base model.
        """
        known = None if adapter is None else self.texts.descriptions.known(adapter)
        tasks = ["embeddings", "text"] if self.texts.generates(limits) else ["embeddings"]
        tasks = tasks if known is None else _tasks_of(known.text, tasks)
        template = self.texts.template_owner(adapter) if "text" in tasks else None
        own = limits if limits is None or known is None else known.tokens.limits(limits)
        return {"tasks": tasks, "chat_template": template, "vocab_size": None if own is None else own.vocab}

    async def _limits(self) -> RequestLimits | None:
        with contextlib.suppress(Unavailable):
            return await self.replicas.limits()
        return None


def _tasks_of(adapter: AdapterText, usual: list[str]) -> list[str]:
    """Return what an adapter is for, where the base model is for the `usual` tasks."""
    if adapter.embedding.classifier is not None:
        labels = adapter.embedding.classifier.labels
        return ["classify", *(["rerank", "score"] if labels is not None and len(labels) == 1 else [])]
    return usual if adapter.reranking is None or adapter.reranking.tokens is None else [*usual, "rerank", "score"]
