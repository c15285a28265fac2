"""Which mounted file system a path belongs to, found without touching it: a mount that hangs would hold the caller."""

import os
import time
from functools import lru_cache
from pathlib import Path

TABLE = Path("/proc/self/mountinfo")
_POINT = 4  # column of the table
_KEPT_S = 10.0


def mount_of(path: str) -> str:
    """Return the mount point of an absolute path, as it is written; "/" where the system has no table of mounts."""
    points = _mount_points(TABLE, int(time.monotonic() / _KEPT_S))
    while path not in points and path not in ("/", ""):
        path = os.path.dirname(path)  # noqa: PTH120
    return path or "/"


@lru_cache(maxsize=1)
def _mount_points(table: Path, _period: int) -> frozenset[str]:
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return frozenset("/")
    columns = (line.split()[_POINT] for line in lines)
    return frozenset(os.fsdecode(each.decode("unicode_escape").encode("latin-1")) for each in columns)
