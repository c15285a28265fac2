"""Ray Serve's REST API on the dashboard of a local cluster."""

import contextlib
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ranklet.cluster.command.causes import last_cause
from ranklet.cluster.command.json_client import fetch_json

_TIMEOUT_S = 10.0
_DEPLOY_TIMEOUT_S = 120.0  # the first deploy also starts Serve
_PATH = "/api/serve/applications/"


class DeployRefused(Exception):  # noqa: N818  # it is no fault of this program
    """Ray did not accept a configuration. The message is Ray's reason."""


@dataclass(frozen=True)
class ServeApi:
    """Attributes: dashboard is its URL, token that of the cluster."""

    dashboard: str
    token: str

    def applications(self) -> dict[str, Any] | None:
        """Return Serve's applications by name; None while Ray does not answer."""
        answer = self._get(_PATH)
        return None if answer is None else dict(answer["applications"])

    def resources(self) -> dict[str, float] | None:
        """Return the sums of all nodes' resources, such as CPU and GPU; None while Ray does not answer."""
        answer = self._get("/api/v0/nodes?detail=1")
        if answer is None:
            return None
        total: dict[str, float] = {}
        for node in answer["data"]["result"]["result"]:
            if node["state"] == "ALIVE":
                for name, amount in node["resources_total"].items():
                    total[name] = total.get(name, 0.0) + float(amount)
        return total

    def deploy(self, content: Mapping[str, Any]) -> None:
        """Replace Serve's configuration. Returns when Ray has accepted it.

        Raises:
            DeployRefused: Ray did not accept it, or did not answer.
        """
        url = self.dashboard + _PATH
        try:
            fetch_json(url, timeout_s=_DEPLOY_TIMEOUT_S, token=self.token, method="PUT", body=dict(content))
        except urllib.error.HTTPError as error:
            raise DeployRefused(last_cause(error.read().decode(errors="replace")) or str(error)) from None
        except (OSError, ValueError) as error:
            raise DeployRefused(f"no answer of Ray's dashboard: {error}") from None

    def _get(self, path: str) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return fetch_json(self.dashboard + path, timeout_s=_TIMEOUT_S, token=self.token)
        return None
