"""Ends the calls of a gateway shortly before Serve kills it, so that streams end with an error event."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import ray

from ranklet.cluster.datapath import serve_controller

_POLL_S: Final = 0.25
_SILENCE_S: Final = 3.0  # without a health check, which Serve sends each second, and none to a gateway that it stops
_RETRY_S: Final = 1.0  # between two looks during a silence
_REFRESH_S: Final = 60.0  # between two looks at the limit else
_ANSWER_S: Final = 2.0  # for Serve's controller
# Before the limit, at which Serve kills the process. In this time, clients get their errors.
_MARGIN_S: Final = 5.0
_MARGIN_SHARE: Final = 1 / 3  # of a short limit

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ServeView:
    """What Serve's controller says about a gateway.

    Attributes:
        limit_s: `graceful_shutdown_timeout_s` of its deployment.
        is_settled: whether all gateways have this limit: Serve does not change the deployment now.
    """

    is_stopping: bool
    limit_s: float
    is_settled: bool


class GatewayShutdown:
    """Looks whether Serve stops this gateway, which Serve does not say before it destroys the object.

    Args:
        look: returns what Serve's controller says; None if it does not list the gateway.
        end_calls: called once, when the time for the requests in flight is nearly over.
    """

    def __init__(self, look: Callable[[], Awaitable[ServeView | None]], end_calls: Callable[[], object]) -> None:
        self._look = look
        self._end_calls = end_calls
        self._limit_s: float | None = None
        self._kept_s = self._looked_s = float("-inf")  # when Serve last kept the gateway, and the last look

    def on_health_check(self) -> None:
        self._kept_s = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Return after `end_calls`."""
        loop = asyncio.get_running_loop()
        self.on_health_check()
        ends_s: float | None = None
        while ends_s is None:
            await asyncio.sleep(_POLL_S)
            ends_s = await self._find_end()
        logger.info("Serve stops this gateway. Its requests end in %.1f s at the latest", ends_s - loop.time())
        await asyncio.sleep(ends_s - loop.time())
        self._end_calls()

    async def _find_end(self) -> float | None:
        """Return when the calls must end, in the event loop's time. None while Serve does not stop the gateway."""
        now_s = asyncio.get_running_loop().time()
        interval_s = _REFRESH_S if now_s - self._kept_s < _SILENCE_S else _RETRY_S
        if now_s - self._looked_s < interval_s:
            return None
        self._looked_s = now_s
        try:
            view = await self._look()
        except Exception as error:  # the controller, or Ray's GCS, may be down
            logger.info("Serve's controller was not reached: %s", type(error).__name__)
            return None
        if view is None:
            return None
        if view.is_stopping:
            limit_s = view.limit_s if self._limit_s is None else self._limit_s
            return self._kept_s + limit_s - min(_MARGIN_S, _MARGIN_SHARE * limit_s)
        self._kept_s = max(self._kept_s, now_s)
        if view.is_settled or self._limit_s is None:
            self._limit_s = view.limit_s
        return None


async def ask_controller(application: str, deployment: str, id: str) -> ServeView | None:
    """Ask Serve's controller about one process of a deployment. Returns None if it does not list the process.

    Raises:
        RayError: there is no answer.
        ValueError: there is no controller.
    """
    details = await asyncio.to_thread(_details, application, deployment)
    states = [str(each.state.value) for each in details.replicas if each.replica_id == id]
    limit_s = float(details.deployment_config.graceful_shutdown_timeout_s)
    return ServeView(states[0] == "STOPPING", limit_s, details.status == "HEALTHY") if states else None


def _details(application: str, deployment: str) -> Any:
    """Return Ray's DeploymentDetails."""
    return ray.get(serve_controller().get_deployment_details.remote(application, deployment), timeout=_ANSWER_S)
