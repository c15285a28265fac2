"""Ray Serve's request router, which uses `Affinity`. No other file of `routing` imports Ray.

Ray's router API is alpha. An exception here would leave requests hanging with nothing but a log line, so every method
falls back to any replica in the order given, and logs one failure in a hundred.
"""

import itertools
import logging
import zlib
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ranklet.routing.binding import get_binding
from ranklet.routing.fleet import Member
from ranklet.routing.hint import HINT, RoutingHint
from ranklet.routing.policy import Policy, check_policy
from ranklet.routing.report import RANK

_FAILURES_PER_LOG = 100

_NO_HINT = RoutingHint(-1)

logger = logging.getLogger("ray.serve")


class AdapterRouter(RequestRouter):
    """Sends requests to the replicas that `Affinity` chooses. Ray creates one per gateway process.

    `request_router_kwargs` are the fields of `Policy`. If any is unusable, the defaults are used and the findings are
    logged: an exception would leave every request hanging.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._failures = itertools.count()
        self._members: list[RunningReplica] = []
        self._affinity, self._counters = get_binding()
        findings = check_policy(kwargs)
        if findings:
            logger.error("request_router_kwargs ignored: %s", "; ".join(findings))
        else:
            self._affinity.set_policy(Policy(**kwargs))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._call_safely(self._set_replicas, replicas)

    def _set_replicas(self, replicas: list[RunningReplica]) -> None:
        self._affinity.set_members([_member(replica) for replica in replicas])
        self._members = list(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the best replicas, each as a rank of its own, then all candidates."""
        try:
            if pending_request is None:
                return [candidate_replicas]
            # Without a backoff, Ray would ask again at once, and the event loop would spin while every replica is full.
            pending_request.routing_context.should_backoff = True
            return self._order(candidate_replicas, pending_request.kwargs.get(HINT) or _NO_HINT)
        except Exception:
            self._log_failure()
            return [list(candidate_replicas)]

    def _order(self, candidates: list[RunningReplica], hint: RoutingHint) -> list[list[RunningReplica]]:
        if hint.only is not None:
            first = [replica for replica in candidates if replica.replica_id.unique_id == hint.only]
            return [first, candidates] if first else [candidates]
        if len(self._members) != len(candidates):
            self._set_replicas(candidates)
        choice = self._affinity.route(hint)
        self._counters.add(choice)
        best = [[self._members[i]] for i in choice.order]
        return best if len(best) == len(candidates) else [*best, candidates]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a replica has taken a request. It is not always the first choice."""
        self._call_safely(self._reassign, pending_request, replica_id.unique_id)

    def _reassign(self, pending: PendingRequest, replica: str) -> None:
        hint = pending.kwargs.get(HINT) or _NO_HINT
        self._affinity.reassign(hint, replica)

    def _call_safely(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:
            self._log_failure()

    def _log_failure(self) -> None:
        if next(self._failures) % _FAILURES_PER_LOG == 0:
            logger.exception("adapter routing failed; using any replica (1 in %d failures logged)", _FAILURES_PER_LOG)


def _member(replica: RunningReplica) -> Member:
    identity, metadata = replica.replica_id.unique_id, replica.replica_metadata
    rank = metadata.get(RANK) if isinstance(metadata, dict) else None
    return Member(identity, rank if isinstance(rank, int) else _default_rank(identity))


def _default_rank(identity: str) -> int:
    """Return a stable rank, above all real ranks, for a replica without one."""
    return 1 << 32 | zlib.crc32(identity.encode())
