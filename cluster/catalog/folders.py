"""Scans the adapters' folder for subfolders that contain an adapter."""

import contextlib
import os
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.names import name_error, normal_name
from ranklet.replicas.adapters.nested import missing_config
from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.escape import escape

_SYSTEM_FOLDERS: Final = frozenset({"lost+found"})  # made by file systems


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A subfolder at the last scan."""

    location: AdapterLocation
    inode: int
    modified_ns: int
    is_folder: bool
    has_config: bool


@dataclass(frozen=True)
class ScannedFolders:
    """The result of a scan.

    Attributes:
        adapters: subfolders that contain an adapter's config, by name. Links, which may leave the root, are None.
        skipped: why other subfolders are no adapters, by their names.
    """

    adapters: dict[str, AdapterFolder | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class FolderScanner:
    """Lists subfolders. Checks a subfolder for a config only if it has changed since the last scan."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: dict[str, AdapterFolder] = {}

    def scan(self) -> ScannedFolders:
        found = ScannedFolders()
        seen: dict[str, AdapterFolder] = {}
        try:
            with os.scandir(self._root) as entries:
                # On Linux, names may differ in their Unicode form only. The folder with the normal form comes first.
                for entry in sorted(entries, key=lambda entry: entry.name != normal_name(entry.name)):
                    if not entry.name.startswith(".") and entry.name not in _SYSTEM_FOLDERS:
                        with contextlib.suppress(OSError):  # it has just been removed, or cannot be read
                            self._add(entry, found, seen)
        except OSError:
            return ScannedFolders()
        self._last = seen
        return found

    def _add(self, entry: "os.DirEntry[str]", found: ScannedFolders, seen: dict[str, AdapterFolder]) -> None:
        name, reason = _checked(entry.name)
        if reason is not None:
            if entry.is_dir():
                found.skipped[name] = reason
            return
        if name in found.adapters:
            found.skipped[entry.name] = (
                f"another folder has this name in another Unicode form, and is served as {name!r}"
            )
            return
        if entry.is_symlink():
            if Path(entry.path, CONFIG_FILE).exists():
                found.adapters[name] = None
            return
        folder = seen[entry.name] = self._look(name, entry)
        if folder.has_config:
            found.adapters[name] = folder
        elif folder.is_folder:
            found.skipped[name] = missing_config(Path(entry.path))

    def _look(self, name: str, entry: "os.DirEntry[str]") -> AdapterFolder:
        status, last = entry.stat(follow_symlinks=False), self._last.get(entry.name)
        if last is not None and last.modified_ns == status.st_mtime_ns and last.inode == status.st_ino:
            return last
        is_folder = stat.S_ISDIR(status.st_mode)
        has_config = is_folder and Path(entry.path, CONFIG_FILE).exists()
        return AdapterFolder(
            AdapterLocation(name, entry.path), status.st_ino, status.st_mtime_ns, is_folder, has_config
        )


@lru_cache(maxsize=65_536)
def _checked(entry: str) -> tuple[str, str | None]:
    """Return the name of a folder, and the reason why it cannot be that of an adapter, or None."""
    name = normal_name(entry)
    reason = name_error(name)
    # Bytes that are not UTF-8 are surrogates in the entry's name, which JSON cannot contain.
    return escape(name), reason
