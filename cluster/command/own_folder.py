"""The folder of one local cluster: its token, its state, its configuration and the log of Ray's start.

Other users of the machine can neither read it nor put files or links into it. Ray's own temporary folder is inside,
because Ray opens that one to everybody.
"""

import contextlib
import json
import os
import shutil
import stat
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = TypeVar("State")

_OURS = (
    "config.yaml", "started.yaml", "ranklet.json", "ray-start.log", "supervisor.json", "supervisor.log", "auth_token",
    "stopping", "haproxy", "ray",
)  # fmt: skip
_RAYS = ("session_", "prom_metrics_service_discovery.json", "ray_")  # earlier versions shared the folder with Ray


class OwnFolder:
    """Files of mode 0600 in a folder of mode 0700. Never follows a link, and reads no file of another user."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def create(self) -> None:
        """Create the folder, or take over one of this user that holds nothing else.

        Raises:
            OSError: it is a link, or cannot be created.
            ValueError: it belongs to another user, or has other files and is open to other users.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        folder = self._open()
        try:
            mode = stat.S_IMODE(os.fstat(folder).st_mode)
            if mode & 0o077:
                self._refuse_other_files(folder, mode)
                os.fchmod(folder, 0o700)
                self._remove_planted(folder)
        finally:
            os.close(folder)

    def read(self, name: str) -> str:
        """Return the text of a file.

        Raises:
            OSError: there is no such file, or it is a link.
            ValueError: the folder or the file belongs to another user.
        """
        folder = self._open()
        try:
            with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), encoding="utf-8") as file:
                self._check_owner(self.path / name, os.fstat(file.fileno()))
                return file.read()
        finally:
            os.close(folder)

    def read_state(self, name: str, kind: type[State]) -> State | None:
        """Return what `write_state` wrote; None if there is no such file, or another version wrote it.

        Raises:
            OSError: the folder or the file is a link, or cannot be read.
            ValueError: the folder or the file belongs to another user.
        """
        try:
            text = self.read(name)
        except FileNotFoundError:
            return None
        try:
            return kind(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def write_state(self, name: str, state: "DataclassInstance") -> None:
        self.write(name, json.dumps(asdict(state)))

    def write(self, name: str, text: str) -> Path:
        """Replace a file, and return its path. A link in its place is replaced, not followed."""
        folder = self._open()
        try:
            made = f".{name}.{os.getpid()}"
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(made, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)
        return self.path / name

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def _open(self) -> int:
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except NotADirectoryError:
            kind = "a link" if self.path.is_symlink() else "a file"
            raise NotADirectoryError(f"{self.path}: expected a folder, got {kind}") from None
        try:
            self._check_owner(self.path, os.fstat(folder))
        except ValueError:
            os.close(folder)
            raise
        return folder

    @staticmethod
    def _check_owner(path: Path, status: os.stat_result) -> None:
        if status.st_uid != os.geteuid():
            raise ValueError(
                f"{path}: expected a file or folder of this user (uid {os.geteuid()}), it belongs to uid "
                f"{status.st_uid}. Run this command as that user, or choose another folder with --temp-dir"
            )

    def _refuse_other_files(self, folder: int, mode: int) -> None:
        others = [each for each in sorted(os.listdir(folder)) if each not in _OURS and not each.startswith(_RAYS)]
        if others:
            raise ValueError(
                f"{self.path}: expected a folder for ranklet alone, got one of mode {mode:o} with other files, such as "
                f"{others[0]}. Choose a new folder with --temp-dir"
            )

    def _remove_planted(self, folder: int) -> None:
        """Delete links, and what other users have put into the folder while it was open to them."""
        for name in os.listdir(folder):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and status.st_uid != os.geteuid():
                shutil.rmtree(name, dir_fd=folder)
            elif not stat.S_ISDIR(status.st_mode) and (stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid()):
                os.unlink(name, dir_fd=folder)
