"""Adapters that operators have loaded or unloaded by name, in a file that outlives all processes of the cluster.

All gateways of all nodes share one file. A writer holds a lock and replaces the whole file, so that a reader sees
either the old content or the new. By default each subfolder is an adapter; the file contains only the deviations.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ranklet.cluster.names import normal_name
from ranklet.cluster.settings.settings import Settings
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.regular_file import read_regular

FOLDER = ".ranklet"  # in the adapters' folder; no adapter's name starts with a dot
_FILE = "adapters.json"
_CHECK_INTERVAL_S = 0.2
_MAX_BYTES = 16 << 20


class FolderNotWritable(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """The folder of the adapters cannot be written to, so that none can be loaded or unloaded by name."""

    code, status = "adapters_dir_not_writable", 503


class Override(BaseModel):
    """An adapter that was loaded or unloaded by name.

    Attributes:
        path: its folder or URL. None for an unloaded adapter, which is not served even if its folder exists.
        pinned: keeps a slot on every replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    pinned: bool = False


class _OverridesFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = 1
    adapters: dict[str, Override] = {}


class Overrides:
    """The overrides of one adapters' folder. Any number of processes may read and write them.

    After a faulty change of the file, its last good content stays in force.

    Args:
        settings: gets the file as the setting "adapters_file".
        clock: monotonic, in seconds.

    Raises:
        InternalError: the file is faulty; the message names it.
    """

    def __init__(
        self, adapters_dir: Path, settings: Settings | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = adapters_dir / FOLDER / _FILE
        settings = settings or Settings()
        self._file = settings.file("adapters_file", self._path, _read, InternalError, _CHECK_INTERVAL_S, clock)

    def entries(self, *, fresh: bool = False) -> Mapping[str, Override]:
        """Return the entries by name. They may be 0.2 s old, unless `fresh` is set."""
        return self._file.content(fresh=fresh)

    def put(self, name: str, entry: Override | None) -> None:
        """Write an entry to disk, or delete the entry if it is None.

        Raises:
            FolderNotWritable: this process may not write to the folder.
            InternalError: the file is faulty.
        """
        with self._writable(), self._locked():
            entries = _read(self._path)
            if entry is None:
                entries.pop(name, None)
            else:
                entries[name] = entry
            self._write(entries)
        self.entries(fresh=True)

    def check_writable(self) -> None:
        """Raise FolderNotWritable if this process may not write to the folder."""
        with self._writable(), self._locked():
            pass

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        folder = self._path.parent
        try:
            folder.mkdir(exist_ok=True)
            yield
        except OSError as error:
            raise FolderNotWritable(
                f"adapters_dir/{FOLDER}: expected a folder that records loads and unloads by name, but {folder} cannot "
                f"be written to: {error.strerror or error}. Let the service's user write to it; adapters that "
                "are moved into adapters_dir are served without it"
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Not blocking: someone else's FIFO in its place would hold the caller.
        lock = os.open(self._path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, entries: Mapping[str, Override]) -> None:
        content = {"version": 1, "adapters": {name: entries[name].model_dump() for name in sorted(entries)}}
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self._path)


def _read(path: Path) -> dict[str, Override]:
    try:
        content = _OverridesFile.model_validate_json(read_regular(path, _MAX_BYTES))
        return {normal_name(name): entry for name, entry in content.adapters.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InternalError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InternalError(
            f"{path}: expected the file that ranklet wrote, got: {where and where + ': '}{first['msg']}. Repair it, or "
            "move it away to serve every folder again"
        ) from error
