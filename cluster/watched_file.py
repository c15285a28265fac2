"""A file whose parsed content is kept in memory and read again when the file changes."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger("ray.serve")
Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """Compares the file's size, times and inode with those of the last read, at most once per `interval_s`.

    When a changed file cannot be read, the last good content stays in force, and the reason is logged.

    Args:
        read: parses the file, which may not exist. Its exceptions at the first read are raised.
        errors: class of exceptions of `read` that later keep the last good content in force.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], Content], errors: type[Exception], interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._path = path
        self._logged_error = ""
        self._read = read
        self._errors = errors
        self._interval_s = interval_s
        self._clock = clock
        self._seen = _signature(path)  # before the read: a change during the read is noticed later
        self._content = read(path)
        self._next_look_s = clock() + interval_s

    def content(self, *, fresh: bool = False) -> Content:
        """Return the content. It may be `interval_s` old, unless `fresh` is set."""
        now_s = self._clock()
        if fresh or now_s >= self._next_look_s:
            self._next_look_s = now_s + self._interval_s
            self._look()
        return self._content

    def _look(self) -> None:
        seen = _signature(self._path)
        if seen == self._seen:
            return
        try:
            self._content = self._read(self._path)
        except self._errors as error:  # `_seen` stays, so that the next look reads the file again
            if str(error) != self._logged_error:
                logger.error("%s. The last good content stays in force", error)
            self._logged_error = str(error)
        else:
            self._seen, self._logged_error = seen, ""


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
