"""Calls from a replica to the gateways."""

import logging
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.broadcast import broadcast
from ranklet.cluster.message import ReportReceiver
from ranklet.routing.report import StateReport

GATEWAY = "Gateway"  # name of the deployment
_TIMEOUT_S = 2.0

logger = logging.getLogger("ray.serve")


class GatewaysClient:
    """Sends reports to all gateways of an application."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: DeploymentHandle[Any] | None = None

    async def send(self, report: StateReport) -> list[str]:
        """Return the ids of the gateways that received the report."""
        try:
            if self._handle is None:  # fails while the gateways have not been deployed
                self._handle = serve.get_deployment_handle(GATEWAY, self._application)
        except (RayError, RayServeException) as error:
            logger.info("no gateway to report to: %s", type(error).__name__)
            return []
        return await broadcast(self._handle, ReportReceiver.on_report.__name__, report, timeout_s=_TIMEOUT_S)
