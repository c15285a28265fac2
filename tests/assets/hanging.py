"""Makes opening a file hang, as on a disk that does not respond, by holding a lease on the file."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Block every open of `path` until the context ends, for at most 45 s (/proc/sys/fs/lease-break-time).

    Works on the main thread only, because it sets a signal handler.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel requests the lease back with it
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)
