"""Tells every gateway how this replica stands: at each change, and now and then to show that it is at work."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.replica.state import ReplicaState
from ranklet.routing.report import BEAT_S, pace_s

_LOOK_S = 0.01  # between two looks for changes
_ANSWER_S = 2.0

logger = logging.getLogger("ray.serve")


class StatePublisher:
    """A task on the replica's event loop.

    Args:
        standing: what is told.
        gateway, app: where the gateways are.
        look: brings what the standing says of the engine up to date.
        at_work: whether the engine shows signs of life; while it does not, nothing is told, and the gateways draw their
            conclusions.
    """

    def __init__(
        self, standing: ReplicaState, gateway: str, app: str, look: Callable[[], None], at_work: Callable[[], bool]
    ) -> None:
        self._standing = standing
        self._where = (gateway, app)
        self._look = look
        self._at_work = at_work
        self._handle: DeploymentHandle[Any] | None = None
        self._gateways: tuple[str, ...] = ()
        self._told_number = -1
        self._told_level = 0
        self._told_loads = 0

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            if self._at_work():
                try:
                    await self._tell()
                except (RayError, RayServeException, grpc.RpcError, TimeoutError) as error:
                    logger.info("gateways not told: %s", type(error).__name__)
                except Exception:
                    logger.exception("gateways not told")
            await asyncio.sleep(pace_s(len(self._gateways)))
            self._look()
            while not self._is_due(loop.time() - began_s):
                await asyncio.sleep(_LOOK_S)
                self._look()

    def _is_due(self, since_s: float) -> bool:
        standing = self._standing
        by_answers = standing.loads_told - self._told_loads >= len(self._gateways)  # that gateways have had meanwhile
        news = standing.held_number != self._told_number or (standing.level() != self._told_level and not by_answers)
        return news or since_s > max(BEAT_S, 4 * pace_s(len(self._gateways)))

    async def _tell(self) -> None:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._where)
        report = self._standing.report(self._gateways)
        self._told_number, self._told_level = report.holdings.number, self._standing.level()
        self._told_loads = report.load.number
        answers = self._handle.broadcast("told", report).results_async(timeout_s=_ANSWER_S, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            self._gateways = tuple(sorted(answer for answer in await answers if isinstance(answer, str)))
