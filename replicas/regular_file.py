"""Opens files of folders that may come from anyone."""

import errno
import io
import os
import stat
import time
from pathlib import Path

_LEASE_POLL_S = 0.01


class TooLargeError(OSError):
    """A file has more bytes than its reader takes."""


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, unbuffered. Anything else in its place, such as a FIFO, is refused without a wait.

    Raises:
        OSError: there is no such file, it cannot be read, or it is no regular file.
    """
    descriptor = _open(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "expected a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor, "rb")


def _open(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except BlockingIOError:  # another process has a lease on the file, which the kernel now asks back
            time.sleep(_LEASE_POLL_S)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a file of limited size.

    Raises:
        TooLargeError: it has more than `most_bytes`.
        OSError: see `open_regular`.
    """
    with io.BufferedReader(open_regular(path)) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most_bytes) + 1)  # a buffer of `most_bytes` would take time
        if size < len(content) <= most_bytes:  # it has grown
            content += file.read(most_bytes + 1 - len(content))
    if len(content) > most_bytes:
        raise TooLargeError(errno.EFBIG, f"expected at most {most_bytes} bytes, got {path.stat().st_size}")
    return content
