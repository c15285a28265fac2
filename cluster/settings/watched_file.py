"""A file whose parsed content is a setting. It is read again when it changes."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic

from ranklet.cluster.settings.setting import Content, Setting


class WatchedFile(Generic[Content]):
    """Compares the file's size, times and inode with those of the last read, at most once per `interval_s`.

    When a changed file cannot be read, the last good content stays in force. Thread-safe.

    Args:
        read: parses the file, which may not exist. Its exceptions at the first read are raised, see `Setting.change`.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], Content], setting: Setting[Content], interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._path = path
        self._read = read
        self._setting = setting
        self._interval_s = interval_s
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._is_good = False
        self._lock = threading.Lock()
        self._look()
        self._next_look_s = clock() + interval_s

    def content(self, *, fresh: bool = False) -> Content:
        """Return the content. It may be `interval_s` old, unless `fresh` is set."""
        now_s = self._clock()
        # While another thread looks, the content that is known must do: its file system may hang.
        if (fresh or now_s >= self._next_look_s) and self._lock.acquire(blocking=fresh):
            try:
                self._next_look_s = now_s + self._interval_s
                self._look()
            finally:
                self._lock.release()
        return self._setting.content

    def _look(self) -> None:
        seen = _signature(self._path)  # before the read: a change during the read is noticed later
        if self._is_good and seen == self._seen:
            return
        # A file that was refused is read at each look: a change of its rights changes neither size nor times.
        self._is_good = self._setting.change(lambda: self._read(self._path))
        self._seen = seen if self._is_good else self._seen


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
