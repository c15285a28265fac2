"""Checks that Ray's token authentication is on. Without it, anyone who can connect to Ray can run code on its nodes."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranklet.cluster.command.deployment_file import SERVE_HOST
from ranklet.cluster.command.finding import Finding
from ranklet.cluster.datapath import is_loopback, missing_token

_SUBJECT = "Ray's token"
_NO_TOKEN = "run `ray get-auth-token --generate` and copy ~/.ray/auth_token to every node; `ranklet up` makes its own"


def check_token(
    http_host: str = SERVE_HOST, environment: Mapping[str, str] | None = None, *, open_ray: bool = False
) -> Finding:
    """Check the environment in which `ray start` would run. Without a token, only a cluster on loopback passes.

    Args:
        http_host: address on which the deployment's HTTP server listens.
        environment: default: this process's environment.
        open_ray: `security.open_ray`, with which gateways start all the same.
    """
    environment = os.environ if environment is None else environment
    source = _token_source(environment)
    if "RAY_AUTH_MODE" not in environment and source:
        return Finding("ok", _SUBJECT, f"on, by default, from {source}")  # Ray turns it on where it finds a token
    remedy = missing_token(environment)
    if remedy is None:
        if source:
            return Finding("ok", _SUBJECT, f"on, from {source}")
        return Finding("fail", _SUBJECT, "on, but there is no token: Ray does not start", _NO_TOKEN)
    if is_loopback(http_host):
        return Finding("warn", _SUBJECT, "off: gateways do not start, except under `ranklet up`", remedy)
    if open_ray:
        return Finding("warn", _SUBJECT, "off, as security.open_ray allows: who connects can run code", remedy)
    return Finding("fail", _SUBJECT, "off: anyone who can connect to a node can run code on it", remedy)


def check_manifest_token(cluster: Mapping[str, Any]) -> Finding:
    """Check `rayClusterConfig` of a KubeRay manifest."""
    environments = _environments(cluster)
    if any(each["RAY_AUTH_MODE"].get("value") != "token" for each in environments if "RAY_AUTH_MODE" in each):
        return Finding("fail", _SUBJECT, "RAY_AUTH_MODE is set, but not to token", "set it to token, or remove it")
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        return Finding("ok", _SUBJECT, "on, from authOptions")
    if environments and all("RAY_AUTH_MODE" in each and "RAY_AUTH_TOKEN" in each for each in environments):
        if all("secretKeyRef" in (each["RAY_AUTH_TOKEN"].get("valueFrom") or {}) for each in environments):
            return Finding("ok", _SUBJECT, "on, from a Secret")
        return Finding("warn", _SUBJECT, "on, but the token is in the manifest", "take RAY_AUTH_TOKEN from a Secret")
    remedy = "add `authOptions: {mode: token}` to rayClusterConfig (KubeRay 1.5.1 or newer)"
    return Finding("fail", _SUBJECT, "off: anyone who can connect to a pod can run code in it", remedy)


def _token_source(environment: Mapping[str, str]) -> str | None:
    """Return the first place with a token, in the order in which Ray searches; None if there is no token."""
    if environment.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token"))
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        path = path.expanduser()
    try:
        return str(path) if path.read_text().strip() else None
    except OSError:
        return None


def _environments(cluster: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the variables of each container by name; none for a group without containers."""
    groups = [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]
    pods = [(group.get("template") or {}).get("spec") or {} for group in groups]
    containers = [each for pod in pods for each in pod.get("containers") or [{}]]
    return [{variable["name"]: variable for variable in each.get("env") or []} for each in containers]
