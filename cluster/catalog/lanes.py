"""Threads that read adapters' files, apart by mounted file system and by host.

A call to one that hangs never returns its thread, so each has few threads of its own, and one folder only two of them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from ranklet.cluster.catalog.source import is_remote
from ranklet.replicas.adapters.mounts import mount_of

_THREADS = 8  # of one file system or host
_SOURCE_THREADS = 2  # of one folder or URL
_MAX_LANES = 64  # hosts beyond these share one
_SHARED = ""
T = TypeVar("T")


class Lanes:
    """Runs blocking calls. Used by one event loop."""

    def __init__(self) -> None:
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, source: str, call: Callable[..., T], *arguments: object) -> T:
        """Run a call that reads a folder or URL. Callers must not cancel it, since its thread would stay busy."""
        turn = self._turns.setdefault(source, asyncio.Semaphore(_SOURCE_THREADS))
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._lane(place_of(source)), call, *arguments)

    def _lane(self, place: str) -> ThreadPoolExecutor:
        if place not in self._lanes and len(self._lanes) >= _MAX_LANES:
            place = _SHARED
        if place not in self._lanes:
            self._lanes[place] = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"files-{len(self._lanes)}")
        return self._lanes[place]


def place_of(source: str) -> str:
    """Return the host of a URL, with its scheme, or the mount point of a folder."""
    if not is_remote(source):
        return mount_of(source)
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc}"
