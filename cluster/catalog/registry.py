"""Which adapters exist: subfolders of one root, and an explicit map. Reads names only, never weights."""

import contextlib
import difflib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.overrides import Override, Overrides
from ranklet.cluster.catalog.remote import is_remote
from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, RankletError, UnknownModel

MAX_NAME_CHARACTERS = 200
_FORBIDDEN = re.compile(r"[/\\:\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of the root as it was last seen."""

    known: AdapterLocation
    inode: int
    written_ns: int
    has_config: bool


@lru_cache(maxsize=65_536)
def _may_be_a_name(name: str) -> bool:
    return name_error(name) is None


def name_error(name: str) -> str | None:
    """Why `name` can be no adapter's name, or None when it can."""
    if not name or len(name) > MAX_NAME_CHARACTERS:
        return f"expected 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}"
    if name.startswith(".") or name != name.strip():
        return "expected a name that neither starts with a dot nor has blanks around it"
    if _FORBIDDEN.search(name):
        return "expected a name without '/', '\\', ':' and control characters"
    return None


class Registry:
    """Adapters by name. A folder dropped into the root is found the first time somebody asks for it.

    What `user_config` says goes first, then what was loaded or unloaded by name, then the explicit map. Entries that
    cannot be right are kept, so that whoever asks for them is told why.
    """

    def __init__(self, root: Path | None, explicit: Mapping[str, Path]) -> None:
        self._root = root
        self.overrides = Overrides(root) if root is not None else None
        self._explicit = dict(explicit)
        self._added: dict[str, Path] = {}
        self._seen: dict[str, _Folder] = {}

    def set_user_config(self, added: Mapping[str, Path]) -> None:
        """Replace what was added to the configured map before; `added` wins over the map and the root."""
        self._added = dict(added)

    def locate(self, name: str, param: str = "model") -> AdapterLocation:
        """The adapter of this name, or of this `name@revision`.

        Raises:
            InvalidRequest: the name tries to leave the root.
            UnknownModel: there is none; the message lists near names.
            AdapterNotFound: the configured folder does not exist.
            InvalidAdapter: it exists, but is no folder, or a link that leaves the root.
        """
        reason = name_error(name)
        if reason and (".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\", "~")) or "\0" in name):
            raise InvalidRequest(
                f"{param}: expected the name of an adapter, got a path ({name!r}). Adapters are served by name only; "
                "GET /v1/models lists them",
                param=param,
            )
        entry = None if name in self._added else self._entries().get(name)
        if entry is not None and entry.path is None:
            raise self._unknown(name, param)
        if entry is not None and entry.path and is_remote(entry.path):
            return AdapterLocation(name, entry.path)
        path = self._added.get(name) or (Path(entry.path) if entry and entry.path else self._explicit.get(name))
        if path is not None:
            return self._configured(name, path)
        known = None if self._root is None or reason else self._inside_root(name, self._root)
        if known is not None:
            return known
        plain, at, revision = name.rpartition("@")
        if at:
            known = self.locate(plain, param)
            if known.requested_revision is None:
                return replace(known, requested_revision=revision, param=param)
        raise self._unknown(name, param)

    def is_in_user_config(self, name: str) -> bool:
        """Whether `user_config` says where it is."""
        return name in self._added

    def is_loaded_by_name(self, name: str) -> bool:
        """Whether it was loaded by name."""
        entry = self._entries().get(name)
        return entry is not None and entry.path is not None

    def exists_without_override(self, name: str) -> bool:
        """Whether it would be served if the book said nothing of it."""
        return name in self._explicit or (self._root is not None and (self._root / name).exists())

    def pins(self) -> dict[str, str]:
        """Adapters that keep a slot on every replica, and where they are."""
        pins = ((name, entry) for name, entry in self._entries().items() if name not in self._added)
        return {name: entry.path for name, entry in pins if entry.pinned and entry.path}

    def _entries(self) -> Mapping[str, Override]:
        return self.overrides.entries() if self.overrides is not None else {}

    def names(self) -> list[str]:
        """Names of all adapters that look like one, sorted. One directory scan."""
        return sorted({*self._named(), *self._folders()} - self._gone())

    def scan(self) -> list[tuple[AdapterLocation, int]]:
        """All adapters that look like one and are there, by name, with the Unix time of their folder's last change."""
        folders, named, gone = self._folders(), self._named(), self._gone()
        plain = ((name, folder) for name, folder in folders.items() if folder is not None)
        found = {name: (each.known, each.written_ns // 10**9) for name, each in plain if name not in gone}
        links = {name for name, folder in folders.items() if folder is None}
        for name in (named | links) - gone:
            found.pop(name, None)
            with contextlib.suppress(RankletError, OSError):  # configured, or a link, and not there
                known = self.locate(name)
                found[name] = known, known.modified_s()
        return [found[name] for name in sorted(found)]

    def _named(self) -> set[str]:
        return {*self._explicit, *self._added, *(name for name, entry in self._entries().items() if entry.path)}

    def _gone(self) -> set[str]:
        return {name for name, entry in self._entries().items() if entry.path is None} - self._added.keys()

    def _folders(self) -> dict[str, "_Folder | None"]:
        """Folders of the root with an adapter's config; None for links, which lead who knows where.

        Whether the config is there is asked once for each state of a folder.
        """
        if self._root is None:
            return {}
        found: dict[str, _Folder | None] = {}
        seen: dict[str, _Folder] = {}
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    name = entry.name
                    folder = self._seen.get(name)
                    if folder is None and not _may_be_a_name(name):
                        continue
                    if entry.is_symlink():
                        if Path(entry.path, CONFIG_FILE).exists():
                            found[name] = None
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if folder is None or folder.written_ns != status.st_mtime_ns or folder.inode != status.st_ino:
                        has_config = stat.S_ISDIR(status.st_mode) and Path(entry.path, CONFIG_FILE).exists()
                        known = AdapterLocation(name, entry.path)
                        folder = _Folder(known, status.st_ino, status.st_mtime_ns, has_config)
                    seen[name] = folder
                    if folder.has_config:
                        found[name] = folder
        except OSError:
            return {}
        self._seen = seen
        return found

    def _configured(self, name: str, path: Path) -> AdapterLocation:
        if name_error(name) is not None:
            raise InvalidAdapter(name, [f"the configured name cannot be used: {name_error(name)}"])
        if ".." in path.parts:
            raise InvalidAdapter(name, [f"the configured path contains '..': {path}; write the path it leads to"])
        if not path.exists():
            raise AdapterNotFound(f"adapter {name!r}: its configured folder {path} does not exist on this node")
        if not path.is_dir():
            raise InvalidAdapter(name, [f"expected a folder, got a file: {path}"])
        return AdapterLocation(name, str(path))

    def _inside_root(self, name: str, root: Path) -> AdapterLocation | None:
        """One look at the file system for the usual folder; None when there is nothing of this name."""
        path = root / name
        try:
            kind = path.lstat().st_mode
            if stat.S_ISLNK(kind):
                inside = path.resolve(strict=True).is_relative_to(root.resolve())
                kind = path.stat().st_mode
                if not inside:
                    raise InvalidAdapter(name, [f"it is a link out of the adapters' folder ({root}); copy it there"])
        except (OSError, ValueError):  # also names that no file can have
            return None
        if not stat.S_ISDIR(kind):
            raise InvalidAdapter(name, [f"expected a folder with {CONFIG_FILE}, got a file: {path}"])
        return AdapterLocation(name, str(path))

    def _unknown(self, name: str, param: str) -> UnknownModel:
        near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
        hint = f"Near names: {', '.join(near)}. " if near else ""
        return UnknownModel(
            f"{param}: no base model or adapter is called {name[:MAX_NAME_CHARACTERS]!r}. {hint}"
            "GET /v1/models lists what is served",
            param=param,
        )
