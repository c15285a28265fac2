"""What operators have changed about the adapters, in a file beside them: it outlives every process of the cluster.

One file for all gateways of all nodes, replaced whole under a lock, so that a reader sees one state or the next. Only
what differs from "each folder is an adapter" is written down.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ranklet.replicas.errors import InternalError

FOLDER = ".ranklet"  # in the adapters' folder; no adapter's name starts with a dot
_FILE = "adapters.json"
_LOOK_S = 0.2  # between two looks for changes that nobody told of


class Override(BaseModel):
    """An adapter that was loaded or unloaded by name.

    Attributes:
        path: its folder; None for one that was unloaded, and is not served though its folder may be there.
        pinned: whether it keeps a slot on every replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    pinned: bool = False


class _OverridesFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = 1
    adapters: dict[str, Override] = {}


class Overrides:
    """The file of one adapters' folder. Any number of processes may have it open.

    Raises:
        InternalError: it cannot be read; the message says which file to repair.
    """

    def __init__(self, adapters_dir: Path) -> None:
        self._path = adapters_dir / FOLDER / _FILE
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, Override] = {}
        self._looked_s = float("-inf")
        self.entries()

    def entries(self, *, fresh: bool = False) -> Mapping[str, Override]:
        """All entries by name, at most a fifth of a second old; `fresh` looks at the file now."""
        now_s = time.monotonic()
        if fresh or now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            try:
                status = self._path.stat()
                seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            except FileNotFoundError:
                seen = None
            if seen != self._seen:
                self._entries = self._read()
                self._seen = seen
        return self._entries

    def put(self, name: str, entry: Override | None) -> None:
        """Write an entry, or take it out, and keep what others wrote meanwhile; it is on disk when this returns.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._path.parent.mkdir(exist_ok=True)
        with self._locked():
            entries = self._read()
            if entry is None:
                entries.pop(name, None)
            else:
                entries[name] = entry
            self._write(entries)
        self.entries(fresh=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._path.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Override]:
        try:
            return dict(_OverridesFile.model_validate_json(self._path.read_bytes()).adapters)
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise InternalError(
                f"{self._path}: expected what ranklet wrote, got: {error.errors()[0]['msg']}. Repair it, or move it "
                "away to serve every folder again"
            ) from error

    def _write(self, entries: Mapping[str, Override]) -> None:
        content = {"version": 1, "adapters": {name: entries[name].model_dump() for name in sorted(entries)}}
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self._path)
