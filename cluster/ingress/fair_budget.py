"""A weighted semaphore that is fair between owners."""

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class _Waiter:
    weight: int
    granted: "asyncio.Future[None]"


class FairBudget:
    """Bounds the total weight and the number of jobs that run at once. Further jobs wait.

    Owners take turns, and the jobs of one owner run in their order. If several jobs of one owner run at once, they use
    at most half of `limit`. A job heavier than `limit` runs while no other job does. While the job of the owner in turn
    does not fit, no other job starts, so that every job runs in the end.

    For use in one event loop.

    Args:
        limit: total weight.
        jobs: number of jobs.
    """

    def __init__(self, limit: int, jobs: int) -> None:
        self._limit = limit
        self._jobs = jobs
        self._running = 0
        self._used: Counter[str] = Counter()  # by owner
        self._waiting: OrderedDict[str, deque[_Waiter]] = OrderedDict()  # the owner in turn first

    @property
    def used(self) -> int:
        """Total weight of the running jobs."""
        return self._used.total()

    @contextlib.asynccontextmanager
    async def spend(self, owner: str, weight: int) -> AsyncIterator[None]:
        """Wait until a job may run. The job ends with the context."""
        await self._acquire(owner, weight)
        try:
            yield
        finally:
            self._release(owner, weight)

    async def _acquire(self, owner: str, weight: int) -> None:
        waiter = _Waiter(weight, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(owner, deque()).append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._grant()  # without this job, others may run
            else:
                self._release(owner, weight)
            raise

    def _release(self, owner: str, weight: int) -> None:
        self._running -= 1
        self._used[owner] -= weight
        if not self._used[owner]:
            del self._used[owner]
        self._grant()

    def _grant(self) -> None:
        while self._running < self._jobs:
            self._drop_cancelled()
            owner = next((each for each in self._waiting if self._fits_share(each)), None)
            if owner is None:
                return
            waiter = self._waiting[owner][0]
            if self._running and self.used + waiter.weight > self._limit:
                return
            self._waiting[owner].popleft()
            self._waiting.move_to_end(owner)
            if not self._waiting[owner]:
                del self._waiting[owner]
            self._running += 1
            self._used[owner] += waiter.weight
            waiter.granted.set_result(None)

    def _fits_share(self, owner: str) -> bool:
        weight = self._waiting[owner][0].weight
        return not self._used[owner] or self._used[owner] + weight <= self._limit // 2

    def _drop_cancelled(self) -> None:
        for owner, queue in list(self._waiting.items()):
            while queue and queue[0].granted.cancelled():
                queue.popleft()
            if not queue:
                del self._waiting[owner]
