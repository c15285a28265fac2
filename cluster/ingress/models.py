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
from ranklet.replicas.errors import Unavailable


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

    async def list_models(self, request: Request) -> Response:
        """List the base model and the adapters that the key may use."""
        key, max_len = self.keys.authenticate(request.headers), await self._max_model_len()
        return json_response(
            {"object": "list", "data": await self.intake.on_thread(partial(self._build_cards, key, max_len))}
        )

    async def get_model(self, request: Request) -> Response:
        """Describe a model, by any name that the field `model` of a request accepts."""
        key, name = self.keys.authenticate(request.headers), request.path_params["name"]
        adapter = await self.intake.on_thread(partial(self.names.resolve, name))
        self.keys.authorize(key, adapter.name if adapter else self.names.base)
        if adapter is not None:
            await self.cards.check_revision(adapter)
        return json_response(self._card(adapter, await self._max_model_len()))

    def _build_cards(self, key: ApiKey | None, max_len: int | None) -> list[dict[str, Any]]:
        may_use_base = key is None or key.may_use(self.names.base)
        cards = [self._card(None, max_len)] if may_use_base else []
        for adapter, modified_s in self.registry.scan():
            if key is None or key.may_use(adapter.name):
                cards.append(self._card(adapter, max_len, modified_s))
        return cards

    def _card(
        self, adapter: AdapterLocation | None, max_len: int | None, modified_s: int | None = None
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
            "max_model_len": max_len,
        }

    async def _max_model_len(self) -> int | None:
        with contextlib.suppress(Unavailable):
            return (await self.replicas.limits()).max_model_len
        return None
