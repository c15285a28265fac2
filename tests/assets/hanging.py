"""A file on a disk that hangs, as the kernel makes one: whoever opens it waits for the holder of its lease."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Opening `path` waits until this ends, at most 45 s (/proc/sys/fs/lease-break-time). On the main thread only."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for the lease back
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)
