"""Finds an adapter below the folder that was named: a snapshot of the hub's cache, or a checkpoint of a training."""

import re
from pathlib import Path

from ranklet.replicas.adapters.findings import shorten
from ranklet.replicas.adapters.reference import CONFIG_FILE

_MAX_LOOKED_AT = 256  # entries of one folder
_NUMBER = re.compile(r"\d+")


def missing_config(folder: Path) -> str:
    """Return what is wrong with a folder without an adapter's config. It names a folder below that has one."""
    below = adapter_below(folder)
    if below is None:
        return f"{CONFIG_FILE}: expected the config that PEFT saves beside the weights; the file is missing"
    return (
        f"{CONFIG_FILE}: expected this file in the folder; the adapter is below, in {shorten(below)}. Load it with "
        "that folder as its path"
    )


def adapter_below(folder: Path) -> str | None:
    """Return the folder below that contains an adapter; of several, the one of the latest snapshot or checkpoint."""
    for parent in (folder / "snapshots", folder):
        found = [each for each in _folders(parent) if _has_config(each)]
        if found:
            return max(found, key=_order).relative_to(folder).as_posix()
    return None


def _folders(parent: Path) -> list[Path]:
    try:
        entries = [path for path, _ in zip(parent.iterdir(), range(_MAX_LOOKED_AT), strict=False)]
        return [path for path in entries if path.is_dir()]
    except OSError:
        return []


def _has_config(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file()
    except OSError:
        return False


def _order(folder: Path) -> tuple[int, float, str]:
    """Return a key that is largest for the last checkpoint; snapshots, named by hashes, are ordered by time."""
    number = _NUMBER.search(folder.name) if folder.name.startswith("checkpoint-") else None
    try:
        changed_s = folder.stat().st_mtime
    except OSError:
        changed_s = 0.0
    return int(number[0][:18]) if number else -1, changed_s, folder.name
