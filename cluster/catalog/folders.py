"""Scans the adapters' folder for subfolders that contain an adapter."""

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ranklet.cluster.catalog.location import AdapterLocation, name_error
from ranklet.replicas.adapters.reference import CONFIG_FILE


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A subfolder at the last scan."""

    location: AdapterLocation
    inode: int
    modified_ns: int
    has_config: bool


class FolderScanner:
    """Lists subfolders. Checks a subfolder for a config only if it has changed since the last scan."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: dict[str, AdapterFolder] = {}

    def scan(self) -> dict[str, AdapterFolder | None]:
        """Return subfolders that contain an adapter's config, by name. Links, which may leave the root, are None."""
        found: dict[str, AdapterFolder | None] = {}
        seen: dict[str, AdapterFolder] = {}
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if entry.name not in self._last and not _is_valid_name(entry.name):
                        continue
                    if entry.is_symlink():
                        if Path(entry.path, CONFIG_FILE).exists():
                            found[entry.name] = None
                        continue
                    folder = seen[entry.name] = self._look(entry)
                    if folder.has_config:
                        found[entry.name] = folder
        except OSError:
            return {}
        self._last = seen
        return found

    def _look(self, entry: "os.DirEntry[str]") -> AdapterFolder:
        status, last = entry.stat(follow_symlinks=False), self._last.get(entry.name)
        if last is not None and last.modified_ns == status.st_mtime_ns and last.inode == status.st_ino:
            return last
        has_config = stat.S_ISDIR(status.st_mode) and Path(entry.path, CONFIG_FILE).exists()
        return AdapterFolder(AdapterLocation(entry.name, entry.path), status.st_ino, status.st_mtime_ns, has_config)


@lru_cache(maxsize=65_536)
def _is_valid_name(name: str) -> bool:
    return name_error(name) is None
