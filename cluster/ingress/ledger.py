"""The Ray actor that holds the quota ledger of an application."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from ranklet.cluster.access.quota import Account, Ledger, QuotaOwner

_NAMESPACE = "ranklet"
_TIMEOUT_S = 2.0


class LedgerActor:
    """Client of the ledger's actor. Creates the actor if it does not exist, for example after a failure."""

    def __init__(self, application: str) -> None:
        self._name = f"quotas-{application}"
        self._actor: Any = None

    async def __call__(self, accounts: Mapping[QuotaOwner, Account]) -> Mapping[QuotaOwner, float]:
        """Settle `accounts` with the ledger; see `Ledger.sync`.

        Raises:
            TimeoutError: the actor did not answer in time, or Ray cannot reach it.
        """
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._get_or_create)
            async with asyncio.timeout(_TIMEOUT_S):
                levels: dict[QuotaOwner, float] = await self._actor.sync.remote(accounts)
                return levels
        except (RayError, TimeoutError) as error:
            self._actor = None
            raise TimeoutError(f"the quota ledger did not answer: {type(error).__name__}") from error

    def _get_or_create(self) -> Any:
        options = {"name": self._name, "namespace": _NAMESPACE, "get_if_exists": True, "num_cpus": 0}
        return ray.remote(Ledger).options(**options).remote()
