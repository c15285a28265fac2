"""Ray Serve's request router over `affinity`: the only file of this room that knows Ray.

Ray's router API is alpha, and an exception here makes requests hang for ever with nothing but a log line to show for
it. So every entry falls back to "any replica, in the order given", and says so in the log once in a while.
"""

import itertools
import logging
import zlib
from collections.abc import Iterable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ranklet.routing import affinity, tally
from ranklet.routing.view import ReplicaView

RESIDENT = "resident"  # key of a replica's routing stats: names of the adapters in its slots
RANK = "rank"  # key of a replica's metadata
ADAPTER = "adapter"  # keyword argument of a call: the adapter's name, None for the base
AVOID = "avoid"  # keyword argument of a call: id of the replica that has just failed it
_LOGGED_FAILURES = 100  # one full traceback per so many

logger = logging.getLogger("ray.serve")


class AdapterRouter(RequestRouter):
    """Sends an adapter's requests where the adapter is; `affinity` holds the policy. One instance per gateway process.

    `request_router_kwargs`: the fields of `affinity.Policy`. Unusable ones are logged and ignored, since raising would
    hang every request.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._turns = itertools.count()
        self._failures = itertools.count()
        self._known: dict[ReplicaID, ReplicaView] = {}
        self._policy = affinity.Policy()
        try:
            self._policy = affinity.Policy(**kwargs)
        except (TypeError, ValueError) as error:
            logger.error("request_router_kwargs ignored, expected balance and free_in_flight: %s", error)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray at each change of the replica set or of a replica's routing stats."""
        super().update_replicas(replicas)
        try:
            self._known = {replica.replica_id: _view(replica) for replica in replicas}
        except Exception:
            self._report()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one per rank of preference, the best first."""
        try:
            if pending_request is not None:
                # Without it Ray asks again at once, and the event loop spins while every replica is full.
                pending_request.routing_context.should_backoff = True
            return [[replica] for replica in self._ordered(candidate_replicas, pending_request)]
        except Exception:
            self._report()
            return [list(candidate_replicas)]

    def _ordered(self, candidates: list[RunningReplica], pending: PendingRequest | None) -> Iterable[RunningReplica]:
        if pending is None:
            return candidates
        views = [self._current(replica) for replica in candidates]
        adapter = pending.kwargs.get(ADAPTER)
        order = affinity.prefer(views, adapter, self._policy, next(self._turns))
        avoid = pending.kwargs.get(AVOID)
        if avoid:
            order.sort(key=lambda index: views[index].id == avoid)  # stable: last, the others keep their order
        if order and adapter:
            tally.current().count(views, order[0], adapter, self._policy)
        return [candidates[index] for index in order]

    def _current(self, replica: RunningReplica) -> ReplicaView:
        """A replica with its load as this router counts it; unknown or older than 10 s is taken for idle."""
        in_flight = self.replica_queue_len_cache.get(replica.replica_id) or 0
        known = self._known.get(replica.replica_id)
        if known is None:
            known = self._known[replica.replica_id] = _view(replica)
        if known.in_flight != in_flight:
            known = ReplicaView(known.id, known.rank, in_flight, known.resident)
            self._known[replica.replica_id] = known
        return known

    def _report(self) -> None:
        if next(self._failures) % _LOGGED_FAILURES == 0:
            logger.exception("adapter routing failed; falling back to any replica (1 in %d logged)", _LOGGED_FAILURES)


def _view(replica: RunningReplica) -> ReplicaView:
    identity = replica.replica_id.unique_id
    rank = (replica.replica_metadata or {}).get(RANK)
    resident = (replica.routing_stats or {}).get(RESIDENT) or ()
    return ReplicaView(
        id=identity,
        rank=rank if isinstance(rank, int) else _stand_in(identity),
        resident=frozenset(name for name in resident if isinstance(name, str)),
    )


def _stand_in(identity: str) -> int:
    """A rank for a replica that has not told its own: stable, and far from any real one."""
    return 1 << 32 | zlib.crc32(identity.encode())
