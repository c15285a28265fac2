"""Ray Serve's request router over `affinity`: the only file of this room that knows Ray.

Ray's router API is alpha, and an exception here makes requests hang for ever with nothing but a log line to show for
it. So every entry falls back to "any replica, in the order given", and says so in the log once in a while.
"""

import itertools
import logging
import time
import zlib
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ranklet.routing import affinity, counters
from ranklet.routing.fleet import Member
from ranklet.routing.hint import HINT, RoutingHint

RANK = "rank"  # key of a replica's metadata
_LOGGED_FAILURES = 100  # one full traceback per so many

_ANY = RoutingHint(-1)

logger = logging.getLogger("ray.serve")


class AdapterRouter(RequestRouter):
    """Sends an adapter's requests where the adapter is; `affinity` holds the policy. One instance per gateway process.

    `request_router_kwargs`: the fields of `affinity.Policy`. Unusable ones are logged and ignored, since raising would
    hang every request.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._failures = itertools.count()
        self._joined: list[RunningReplica] = []
        try:
            affinity.current().policy = affinity.Policy(**kwargs)
        except (TypeError, ValueError) as error:
            logger.error("request_router_kwargs ignored: %s", error)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray at each change of the replica set."""
        super().update_replicas(replicas)
        self._guarded(self._join, replicas)

    def _join(self, replicas: list[RunningReplica]) -> None:
        routes = affinity.current()
        with routes.lock:
            routes.fleet.join([_member(replica) for replica in replicas], time.monotonic())
            self._joined = list(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best few, one per rank of preference, then the others."""
        try:
            if pending_request is not None:
                # Without it Ray asks again at once, and the event loop spins while every replica is full.
                pending_request.routing_context.should_backoff = True
            return self._ordered(candidate_replicas, pending_request)
        except Exception:
            self._report()
            return [list(candidate_replicas)]

    def _ordered(self, candidates: list[RunningReplica], pending: PendingRequest | None) -> list[list[RunningReplica]]:
        if pending is None:
            return [candidates]
        hint, routes, now_s = pending.kwargs.get(HINT) or _ANY, affinity.current(), time.monotonic()
        if hint.only is not None:
            first = [replica for replica in candidates if replica.replica_id.unique_id == hint.only]
            return [first, candidates] if first else [candidates]
        with routes.lock:
            if len(self._joined) != len(candidates):
                self._join(candidates)
            choice = routes.choose(hint.adapter, hint.tokens, now_s, avoid=hint.avoid)
            if hint.tokens and choice.order:
                routes.fleet.sent(hint.id, choice.order[0], hint.tokens, now_s)
            best = [[self._joined[i]] for i in choice.order]
        counters.current().count(choice)
        if choice.prefetch and hint.adapter is not None and routes.orders is not None:
            for replica in choice.prefetch:
                routes.orders.put((replica, hint.adapter))
        return best if len(best) == len(candidates) else [*best, candidates]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a replica has taken a request: not always the first choice."""
        self._guarded(self._routed, pending_request, replica_id.unique_id)

    def _routed(self, pending: PendingRequest, replica: str) -> None:
        hint, routes = pending.kwargs.get(HINT) or _ANY, affinity.current()
        with routes.lock:
            i = routes.fleet.index.get(replica)
            if i is not None and routes.fleet.where(hint.id) not in (None, replica):
                routes.fleet.sent(hint.id, i, hint.tokens, time.monotonic())

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception:
            self._report()

    def _report(self) -> None:
        if next(self._failures) % _LOGGED_FAILURES == 0:
            logger.exception("adapter routing failed; falling back to any replica (1 in %d logged)", _LOGGED_FAILURES)


def _member(replica: RunningReplica) -> Member:
    identity, metadata = replica.replica_id.unique_id, replica.replica_metadata
    rank = metadata.get(RANK) if isinstance(metadata, dict) else None
    return Member(identity, rank if isinstance(rank, int) else _stand_in(identity))


def _stand_in(identity: str) -> int:
    """A rank for a replica that has not told its own: stable, and far from any real one."""
    return 1 << 32 | zlib.crc32(identity.encode())
