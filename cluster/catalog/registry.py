"""The adapters of the service by name: subfolders of one root, configured folders, and overrides."""

import contextlib
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ranklet.cluster.catalog.folders import FolderScanner, ScannedFolders
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.overrides import Override, Overrides
from ranklet.cluster.catalog.similar_names import similar_names
from ranklet.cluster.catalog.source import AllowedSources, is_remote
from ranklet.cluster.names import MAX_NAME_CHARACTERS, name_error, normal_name, spellings
from ranklet.cluster.settings.settings import Settings
from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, RankletError, UnknownModel


class Registry:
    """Locates adapters by name. Reads none of their files. A new folder in the root is found at its first request.

    Precedence: `user_config`, then overrides, then configured folders, then the root. Faulty entries are kept, so that
    a request for one gets an error that explains the fault.

    Args:
        root: folder whose subfolders are adapters.
        configured: folders by name, from the arguments of the application.
        base_names: of the base model, which no adapter may have.
        settings: gets the file of overrides, see `Overrides`.
        allowed: where overrides may be, besides the root.
    """

    def __init__(
        self, root: Path | None, configured: Mapping[str, Path], base_names: Sequence[str] = (),
        settings: Settings | None = None, allowed: AllowedSources | None = None,
    ) -> None:  # fmt: skip
        self._root = root
        self._scanner = FolderScanner(root) if root is not None else None
        self.overrides = Overrides(root, settings) if root is not None else None
        self._allowed = allowed or AllowedSources(() if root is None else (root,), ())
        self._configured = dict(configured)
        self._base_names = tuple(base_names)
        self._user_config: dict[str, Path] = {}

    def set_user_config(self, folders: Mapping[str, Path]) -> None:
        self._user_config = dict(folders)

    def root_problem(self) -> str | None:
        """Return what is wrong with the folder of adapters; None if nothing is. It may be made later."""
        if self._root is None or self._root.is_dir():
            return None
        return f"{self._root} does not exist, so no adapter is served from it"

    def locate(
        self, name: str, param: str = "model", may_use: Callable[[str], bool] = lambda name: True
    ) -> AdapterLocation:
        """Return the location of the adapter `name`, or `name@revision`.

        Args:
            param: the request's field that contains `name`.
            may_use: whether the request may use an adapter of this name. Others count as missing.

        Raises:
            InvalidRequest: the name is a path.
            UnknownModel: there is no such adapter; the message lists similar names.
            AdapterNotFound: the configured folder does not exist.
            InvalidAdapter: the entry is not a folder, is a link that leaves the root, or has a name of the base model.
        """
        name = normal_name(name)
        reason = name_error(name)
        if reason and (".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\", "~")) or "\0" in name):
            raise InvalidRequest(
                f"{param}: expected the name of an adapter, got a path ({name!r}). Adapters are served by name only; "
                "GET /v1/models lists them",
                param=param,
            )
        location = self._locate_entry(name) if may_use(name) else None
        location = location or self._locate_revision(name, param, may_use)
        if location is None and name in self._base_names:
            raise UnknownModel(
                f"{param}: expected the name of an adapter, but {name!r} is a name of the base model", param=param
            )
        if location is None:
            raise UnknownModel(
                f"{param}: expected the name of the base model or of an adapter, got {name[:MAX_NAME_CHARACTERS]!r}. "
                f"{self._hint(name, may_use)}GET /v1/models lists all models",
                param=param,
            )
        return location

    def name_error(self, name: str) -> str | None:
        """Return the reason why `name`, in its normal form, cannot be the name of an adapter, or None."""
        return name_error(name, self._base_names)

    def _locate_entry(self, name: str) -> AdapterLocation | None:
        location = self._find_entry(name)
        if location is not None and (reason := self.name_error(name)):
            raise InvalidAdapter(name, [reason])
        return location

    def _find_entry(self, name: str) -> AdapterLocation | None:
        entry = None if name in self._user_config else self._entries().get(name)
        if entry is not None:
            if entry.path is None:
                return None
            self._check_override(name, entry.path)
            return AdapterLocation(name, entry.path) if is_remote(entry.path) else _check_folder(name, Path(entry.path))
        path = self._user_config.get(name) or self._configured.get(name)
        if path is not None:
            return _check_folder(name, path)
        return self._find_in_root(name)

    def _check_override(self, name: str, source: str) -> None:
        """Check an entry as a load by name is checked: others than gateways may be able to write to its file."""
        reason = self._allowed.problem(source)
        if reason is not None:
            raise InvalidAdapter(name, [f"{reason}. Load it again by name, or unload it"])

    def _find_in_root(self, name: str) -> AdapterLocation | None:
        if self._root is None or "/" in name or name_error(name):
            return None
        for spelling in spellings(name):
            if (location := _locate_in_root(name, self._root / spelling, self._root)) is not None:
                return location
        folder = None if name.isascii() else self._folders().adapters.get(name)
        return None if folder is None else folder.location

    def _locate_revision(self, name: str, param: str, may_use: Callable[[str], bool]) -> AdapterLocation | None:
        plain, at, revision = name.rpartition("@")
        if not at or not may_use(plain) or (may_use(name) and name in self._unloaded()):
            return None
        location = self._locate_entry(plain)
        return None if location is None else replace(location, requested_revision=revision, param=param)

    def is_in_user_config(self, name: str) -> bool:
        return name in self._user_config

    def is_loaded_by_name(self, name: str) -> bool:
        entry = self._entries().get(name)
        return entry is not None and entry.path is not None

    def exists_without_override(self, name: str) -> bool:
        """Return whether the adapter would exist if it had no override."""
        with contextlib.suppress(InvalidAdapter):
            return name in self._configured or self._find_in_root(name) is not None
        return True

    def pins(self) -> dict[str, str]:
        pins = ((name, entry) for name, entry in self._entries().items() if name not in self._user_config)
        return {
            name: entry.path
            for name, entry in pins
            if entry.pinned
            and entry.path
            and self.name_error(name) is None
            and self._allowed.problem(entry.path) is None
        }

    def _entries(self) -> Mapping[str, Override]:
        return self.overrides.entries() if self.overrides is not None else {}

    def names(self) -> list[str]:
        """Return the sorted names of all adapters. A folder without a config is no adapter."""
        return sorted({*self._named(), *self._folders().adapters} - self._unloaded())

    def skipped(self) -> dict[str, str]:
        """Return why other folders in the root are no adapters, by their names."""
        unloaded = self._unloaded()
        return {name: why for name, why in self._folders().skipped.items() if name not in unloaded}

    def scan(self) -> list[tuple[AdapterLocation, int]]:
        """Return the adapters whose folders exist, by name, with the folders' modification times (Unix time)."""
        folders, named, unloaded = self._folders().adapters, self._named(), self._unloaded()
        valid = {name: folder for name, folder in folders.items() if self.name_error(name) is None}
        plain = ((name, folder) for name, folder in valid.items() if folder is not None)
        found = {name: (each.location, each.modified_ns // 10**9) for name, each in plain if name not in unloaded}
        links = {name for name, folder in valid.items() if folder is None}
        for name in (named | links) - unloaded:
            found.pop(name, None)
            with contextlib.suppress(RankletError, OSError):  # its folder does not exist
                location = self.locate(name)
                found[name] = location, location.modified_s()
        return [found[name] for name in sorted(found)]

    def _folders(self) -> ScannedFolders:
        return self._scanner.scan() if self._scanner else ScannedFolders()

    def _named(self) -> set[str]:
        return {*self._configured, *self._user_config, *(name for name, entry in self._entries().items() if entry.path)}

    def _unloaded(self) -> set[str]:
        return {name for name, entry in self._entries().items() if entry.path is None} - self._user_config.keys()

    def _hint(self, name: str, may_use: Callable[[str], bool]) -> str:
        near = similar_names(name, self.names(), may_use)
        return f"Similar names: {', '.join(near)}. " if near else ""


def _check_folder(name: str, path: Path) -> AdapterLocation:
    if reason := name_error(name):
        raise InvalidAdapter(name, [reason])
    if ".." in path.parts:
        raise InvalidAdapter(
            name, [f"expected a configured path without '..', got {path}; write the path that it leads to"]
        )
    if not path.exists():
        raise AdapterNotFound(f"adapter {name!r}: its configured folder {path} does not exist on this node")
    if not path.is_dir():
        raise InvalidAdapter(name, [f"expected a folder, got a file: {path}"])
    return AdapterLocation(name, str(path))


def _locate_in_root(name: str, path: Path, root: Path) -> AdapterLocation | None:
    """Return None if the root has no entry `path`. Makes one system call for a plain folder."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            inside = path.resolve(strict=True).is_relative_to(root.resolve())
            mode = path.stat().st_mode
            if not inside:
                raise InvalidAdapter(
                    name,
                    [f"expected a folder, got a link that leaves the adapters' folder {root}; copy the files there"],
                )
    except (OSError, ValueError):  # ValueError: no file can have this name
        return None
    if not stat.S_ISDIR(mode):
        raise InvalidAdapter(name, [f"expected a folder with {CONFIG_FILE}, got a file: {path}"])
    return AdapterLocation(name, str(path))
