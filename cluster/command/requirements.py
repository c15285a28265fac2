"""What a configuration needs of the machine: CPUs and GPUs for its deployments, and its HTTP port."""

import errno
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

_POLL_S = 0.2
_REMEDIES = {
    "GPU": "Lower num_replicas, or serve from the CPU with `engine: {device: cpu}` and without num_gpus",
    "CPU": "Lower num_replicas or num_cpus",
}
_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}
_DEFAULTS: dict[str, dict[str, Any]] = {"Gateway": {}, "Replica": {}}


def missing_resources(content: Mapping[str, Any], available: Mapping[str, float]) -> list[str]:
    """Return one sentence for CPUs and GPUs if the deployments need more than there are.

    Resources of other names are those of nodes that may join later.
    """
    needed: dict[str, list[tuple[str, int, float]]] = {}
    for name, count, resources in _replicas(content):
        for resource, amount in resources.items():
            needed.setdefault(resource, []).append((name, count, amount))
    found = []
    for resource, uses in needed.items():
        total, there = sum(count * amount for _, count, amount in uses), available.get(resource, 0.0)
        if total > there + 1e-6:
            terms = ", ".join(f"{name}: {count} x {amount:g}" for name, count, amount in uses if amount)
            remedy = _REMEDIES.get(resource, "Lower num_replicas")
            found.append(f"the deployments need {total:g} {resource}s ({terms}), there are {there:g}. {remedy}")
    return found


def _replicas(content: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield each deployment's name, its number of replicas at the start, and the resources of each."""
    for application in content.get("applications") or []:
        named = {each.get("name"): each for each in application.get("deployments") or []}
        for name, settings in {**_DEFAULTS, **named}.items():
            scaling = settings.get("autoscaling_config")
            count = settings.get("num_replicas") or 1
            if isinstance(scaling, Mapping):
                count = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
            options = settings.get("ray_actor_options") or {}
            resources = {_NAMES[key]: options[key] for key in _NAMES if options.get(key) is not None}
            yield name, int(count), {"CPU": 1.0} | resources


def port_problem(host: str, port: int, patience_s: float = 2.0) -> str | None:
    """Return why no server can listen on `host` and `port`; None if one can.

    Waits up to `patience_s` for the port, which a cluster that has just ended may still hold.
    """
    deadline_s = time.monotonic() + patience_s
    while (error := _listen(host, port)) is not None:
        if error.errno != errno.EADDRINUSE:
            return f"http_options: expected an address on which this machine can listen, got {host}:{port}: {error}"
        if time.monotonic() > deadline_s:
            return (
                f"http_options.port: {port} on {host} is in use. `ss -ltnp sport = :{port}` shows the process that "
                "listens there; choose another port, or --port 0 for any free one"
            )
        time.sleep(_POLL_S)
    return None


def _listen(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        return error
    return None
