"""Which adapters exist: subfolders of one root, and an explicit map. Reads names only, never weights."""

import difflib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, UnknownModel
from ranklet.replicas.reference import CONFIG_FILE

MAX_NAME_CHARACTERS = 200
_FORBIDDEN = re.compile(r"[/\\:\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Known:
    """An adapter by name, and the folder it is in. Its content has not been looked at."""

    name: str
    path: Path


def refusal_of_name(name: str) -> str | None:
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

    The explicit map goes first. Entries of it that cannot be right are kept, so that whoever asks for them is told why.
    """

    def __init__(self, root: Path | None, explicit: Mapping[str, Path]) -> None:
        self._root = root
        self._explicit = dict(explicit)
        self._added: dict[str, Path] = {}

    def change(self, added: Mapping[str, Path]) -> None:
        """Replace what was added to the configured map before; `added` wins over the map and the root."""
        self._added = dict(added)

    def find(self, name: str, param: str = "model") -> Known:
        """The adapter of this name.

        Raises:
            InvalidRequest: the name tries to leave the root.
            UnknownModel: there is none; the message lists near names.
            AdapterNotFound: the configured folder does not exist.
            InvalidAdapter: it exists, but is no folder, or a link that leaves the root.
        """
        reason = refusal_of_name(name)
        if reason and (".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\", "~")) or "\0" in name):
            raise InvalidRequest(
                f"{param}: expected the name of an adapter, got a path ({name!r}). Adapters are served by name only; "
                "GET /v1/models lists them",
                param=param,
            )
        path = self._added.get(name) or self._explicit.get(name)
        if path is not None:
            return self._configured(name, path)
        known = None if self._root is None or reason else self._inside_root(name, self._root)
        if known is None:
            raise self._unknown(name, param)
        return known

    def names(self) -> list[str]:
        """Names of all adapters that look like one, sorted. One directory scan."""
        return sorted({*self._explicit, *self._added, *self._folders()})

    def _folders(self) -> list[str]:
        if self._root is None or not self._root.is_dir():
            return []
        return [
            folder.name
            for folder in self._root.iterdir()
            if refusal_of_name(folder.name) is None and (folder / CONFIG_FILE).is_file()
        ]

    def _configured(self, name: str, path: Path) -> Known:
        if refusal_of_name(name) is not None:
            raise InvalidAdapter(name, [f"the configured name cannot be used: {refusal_of_name(name)}"])
        if ".." in path.parts:
            raise InvalidAdapter(name, [f"the configured path contains '..': {path}; write the path it leads to"])
        if not path.exists():
            raise AdapterNotFound(f"adapter {name!r}: its configured folder {path} does not exist on this node")
        if not path.is_dir():
            raise InvalidAdapter(name, [f"expected a folder, got a file: {path}"])
        return Known(name, path)

    def _inside_root(self, name: str, root: Path) -> Known | None:
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
        return Known(name, path)

    def _unknown(self, name: str, param: str) -> UnknownModel:
        near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
        hint = f"Near names: {', '.join(near)}. " if near else ""
        return UnknownModel(
            f"{param}: no base model or adapter is called {name[:MAX_NAME_CHARACTERS]!r}. {hint}"
            "GET /v1/models lists what is served",
            param=param,
        )
