"""Cancels calls to replicas that hang, and sends the router's prefetch orders to replicas."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.replicas.errors import Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import PrefetchOrder

_POLL_S = 0.02
_MAX_PREFETCHES = 64  # under way at once; further orders are dropped

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Abandoned:
    """A call that the watchdog cancelled.

    Attributes:
        replica: the id of the replica that hangs; None if no replica was up in time.
        is_stopping: whether all calls were cancelled, because the gateway stops.
    """

    replica: str | None
    is_stopping: bool = False


class Watchdog:
    """Watches the calls of one gateway.

    Args:
        affinity: the router's state. It names the calls without a working replica, and holds the prefetch orders.
        prefetch: orders a replica, given by its id, to load an adapter.
        no_replica_timeout_s: how long a call waits for a replica to come up.
    """

    def __init__(
        self, affinity: Affinity, prefetch: Callable[[AdapterLocation, str], Coroutine[Any, Any, None]],
        no_replica_timeout_s: float,
    ) -> None:  # fmt: skip
        self._affinity = affinity
        self._prefetch = prefetch
        self._no_replica_timeout_s = no_replica_timeout_s
        self._calls: dict[
            int, tuple[asyncio.Task[Any], float]
        ] = {}  # by hint id, with the start, in the event loop's time
        self._abandoned: dict[int, Abandoned] = {}
        self._begun: set[int] = set()
        self._has_ended = False
        self._prefetches: set[asyncio.Task[None]] = set()

    def watch(self, hint_id: int) -> None:
        """Watch a call of the current task, until `unwatch`.

        Raises:
            Unavailable: the gateway stops.
        """
        if self._has_ended:
            raise stopping()
        task = asyncio.current_task()
        assert task is not None, "called outside of a task"
        self._calls[hint_id] = task, task.get_loop().time()

    def unwatch(self, hint_id: int) -> None:
        del self._calls[hint_id]
        self._abandoned.pop(hint_id, None)
        self._begun.discard(hint_id)

    def begin(self, hint_id: int) -> None:
        """Note that a replica works on a call. It goes on where the replica drains and no other is up."""
        if hint_id in self._calls:
            self._begun.add(hint_id)

    def abandoned(self, hint_id: int) -> Abandoned | None:
        """Return why the watchdog cancelled a call, or None if it did not."""
        return self._abandoned.get(hint_id)

    def end_calls(self) -> None:
        """Cancel all calls, because the gateway stops. Later ones are refused."""
        self._has_ended = True
        for id in self._calls.keys() - self._abandoned.keys():
            self._abandon(id, Abandoned(None, is_stopping=True))

    async def run(self) -> None:
        """Watch calls and send prefetch orders until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                self._cancel_hopeless_calls()
                for order in self._affinity.pop_prefetch_orders():
                    self._start_prefetch(order)
            except Exception:
                logger.exception("the watchdog failed once and continues")

    def _cancel_hopeless_calls(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for id, replica in self._affinity.stranded(self._calls).items():
            _, started_s = self._calls[id]
            is_late = id not in self._begun and now_s - started_s > self._no_replica_timeout_s
            hopeless = replica is not None or is_late
            if hopeless and id not in self._abandoned:
                self._abandon(id, Abandoned(replica))

    def _abandon(self, id: int, abandoned: Abandoned) -> None:
        self._abandoned[id] = abandoned
        self._calls[id][0].cancel()

    def _start_prefetch(self, order: PrefetchOrder) -> None:
        if not isinstance(order.location, AdapterLocation) or len(self._prefetches) >= _MAX_PREFETCHES:
            return
        work = self._prefetch(order.location, order.replica)
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._prefetches.add(task)
        task.add_done_callback(self._prefetches.discard)


def stopping() -> Unavailable:
    return Unavailable("the gateway stops, and the time for requests in flight is over. Send the request again")
