"""Which settings' newest contents were refused, over all processes of the application."""

from collections.abc import Iterable
from typing import Any

from ranklet.cluster.message import GatewayDescription, ReplicaDescription


def refused_settings(processes: Iterable[GatewayDescription | ReplicaDescription]) -> list[dict[str, Any]]:
    """Return an entry for each setting, role and reason, with the ids of the processes."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for process in processes:
        for setting, reason in process.refused_settings.items():
            found.setdefault((setting, process.labels["role"], reason), []).append(process.id)
    return [
        {"setting": setting, "role": role, "reason": reason, "processes": sorted(ids)}
        for (setting, role, reason), ids in sorted(found.items())
    ]
