"""Makes the paths of a configuration absolute, since Ray's processes may have another current folder."""

from pathlib import Path
from typing import Any


def make_paths_absolute(application: dict[str, Any], directory: Path) -> None:
    """Make the paths of an application's arguments and `user_config` absolute, in place."""
    arguments = application["args"]
    _join(arguments.get("base"), "model_dir", directory)
    _join(arguments, "adapters_dir", directory)
    _join(arguments.get("sources"), "cache_dir", directory)
    security = arguments.get("security") or {}
    _join(security, "keys_file", directory)
    if security.get("adapter_roots"):
        security["adapter_roots"] = [str(directory / root) for root in security["adapter_roots"]]
    users = [each.get("user_config") for each in application.get("deployments") or []]
    for holder in (arguments, *users):
        adapters = holder.get("adapters") if isinstance(holder, dict) else None
        if isinstance(adapters, dict):
            for name in adapters:
                _join(adapters, name, directory)
        elif isinstance(adapters, list):
            for entry in adapters:
                _join(entry, "path", directory)


def _join(holder: Any, key: str, directory: Path) -> None:
    if isinstance(holder, dict) and isinstance(holder.get(key), str):
        holder[key] = str(directory / holder[key])
