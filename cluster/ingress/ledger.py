"""The Ray actor that holds the quota ledger of an application."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from ranklet.cluster.access.quota_ledger import Grant, Ledger, QuotaOwner, Statement

_NAMESPACE = "ranklet"
_TIMEOUT_S = 2.0


class LedgerActor:
    """Client of the ledger's actor. Creates the actor if it does not exist, for example after a failure."""

    def __init__(self, application: str) -> None:
        self._name = f"quotas-{application}"
        self._actor: asyncio.Future[Any] | None = None

    async def __call__(self, statements: Mapping[QuotaOwner, Statement]) -> Mapping[QuotaOwner, Grant]:
        """Settle with the ledger; see `Ledger.settle`.

        Raises:
            TimeoutError: the actor did not answer in time, or Ray cannot reach it.
        """
        if self._actor is None:
            self._actor = asyncio.ensure_future(asyncio.to_thread(self._get_or_create))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                actor = await asyncio.shield(self._actor)  # one thread at most waits for Ray
                grants: dict[QuotaOwner, Grant] = await actor.settle.remote(statements)
                return grants
        except (RayError, ValueError, TimeoutError) as error:
            if self._actor.done():
                self._actor = None
            raise TimeoutError(f"the quota ledger did not answer: {type(error).__name__}") from error

    def _get_or_create(self) -> Any:
        options = {"name": self._name, "namespace": _NAMESPACE, "get_if_exists": True, "num_cpus": 0}
        return ray.remote(Ledger).options(**options).remote()
