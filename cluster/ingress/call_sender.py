"""Sends calls to replicas: repeats a failed one on another replica, and cancels those that are abandoned."""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.ingress.watchdog import Watchdog, stopping
from ranklet.cluster.message import InferenceCall, InferenceReply, Refusal
from ranklet.cluster.text_prefix import text_hint
from ranklet.replicas.errors import InternalError, RankletError, Saturated, Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT, RoutingHint

# The replica or its connection is gone, so the call may be repeated.
_LOST = (RayActorError, TaskCancelledError, RequestCancelledError)
_LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Attemptable(Protocol):
    """A call that may be sent more than once."""

    @property
    def continues(self) -> bool:
        """Whether the next attempt continues texts."""

    def attempt(self) -> AbstractContextManager[InferenceCall[Any]]:
        """Return the call to send, valid until the attempt has ended."""

    def pause_before_repeat(self, failure: "RepeatableError") -> float:
        """Return how many seconds to wait before another replica gets the call.

        Raises:
            RankletError: no other replica should get it.
        """


@dataclass
class RepeatableCall:
    """A call whose result arrives as a whole. It is repeated once."""

    call: InferenceCall[Any]
    continues = False
    _is_repeated: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[InferenceCall[Any]]:
        yield self.call

    def pause_before_repeat(self, failure: "RepeatableError") -> float:
        if self._is_repeated:
            raise failure.error from failure
        self._is_repeated = True
        return 0.0


class CallSender:
    """Sends the inference calls of one gateway.

    Args:
        hint_ids: unique in this process.
        no_replica_timeout_s: how long a call waits for a replica to come up.
        on_repeat: called for each repeated call, with whether it continues texts.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", affinity: Affinity, watchdog: Watchdog, hint_ids: Iterator[int],
        no_replica_timeout_s: float, on_repeat: Callable[[bool], None],
    ) -> None:  # fmt: skip
        self._handle = handle
        self._affinity = affinity
        self._watchdog = watchdog
        self._hint_ids = hint_ids
        self._no_replica_timeout_s = no_replica_timeout_s
        self._on_repeat = on_repeat

    async def send_all(self, method: str, calls: Sequence[Attemptable]) -> list[InferenceReply[Any]]:
        """Call `method` of the replicas with each call at the same time, and return the replies in this order.

        Raises:
            Unavailable: several replicas failed.
            RankletError: a replica returned this error.
        """
        if len(calls) == 1:
            return [await self._send(method, calls[0])]
        # Ray 2.60 identifies a call that waits for a replica by the id of its HTTP request, so that the second of two
        # calls with one id waits for ever. In an empty context, Ray gives each call an id of its own.
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._send(method, call), context=contextvars.Context()) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # if one call failed, the results of the others are not needed
                task.cancel()

    async def _send(self, method: str, each: Attemptable) -> InferenceReply[Any]:
        avoid: str | None = None
        while True:
            try:
                with each.attempt() as call:
                    return await self._attempt(method, call, avoid)
            except RepeatableError as failure:
                pause_s, avoid = each.pause_before_repeat(failure), failure.replica
            self._on_repeat(each.continues)
            await asyncio.sleep(pause_s)

    async def _attempt(self, method: str, call: InferenceCall[Any], avoid: str | None) -> InferenceReply[Any]:
        id = call.number or next(self._hint_ids)
        hint = RoutingHint(id, call.adapter_name, call.work, avoid, location=call.adapter, text=text_hint(call))
        result: InferenceReply[Any] | Refusal | None = None
        self._watchdog.watch(hint.id)
        # The adapter is not passed as a multiplexed model id: Ray 2.60 keeps every call that has one, for ever, unless
        # Ray's own multiplexing routes it.
        response = self._handle.options(method_name=method).remote(call, **{HINT: hint})
        try:
            result = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            self._raise_if_abandoned(hint.id)
            raise
        except Exception as error:
            raise _translate(error, self._affinity.replica_of(hint.id)) from error
        finally:
            self._watchdog.unwatch(hint.id)
            self._complete(hint, result)
        if isinstance(result, InferenceReply):
            return result
        refusal = result.error()
        if isinstance(refusal, Unavailable | Saturated):
            raise RepeatableError(refusal, result.replica, has_begun=result.has_begun)
        raise refusal

    def _raise_if_abandoned(self, hint_id: int) -> None:
        abandoned = self._watchdog.abandoned(hint_id)
        if abandoned is None:
            return
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        if abandoned.is_stopping:
            raise stopping() from None
        if abandoned.replica is not None:
            raise RepeatableError(_lost("hangs"), abandoned.replica) from None
        raise Unavailable(
            f"expected a replica within {self._no_replica_timeout_s:g} s (limits.no_replica_timeout_s), but none is "
            "up. Try again"
        ) from None

    def _complete(self, hint: RoutingHint, result: InferenceReply[Any] | Refusal | None) -> None:
        if result is None:
            self._affinity.complete(hint.id)
        else:
            age_s = time.time() - result.load.at_s if result.load else 0.0
            cached = getattr(result.result, "cached_tokens", None) if isinstance(result, InferenceReply) else None
            self._affinity.complete(hint.id, result.replica, result.load, age_s, cached)


def _lost(reason: str) -> Unavailable:
    return Unavailable(f"the replica that computed the request {reason}, and no other could answer. Try again")


class RepeatableError(Exception):
    """A failure of one replica. The call may be repeated on another; `error` is raised if that fails too.

    Args:
        replica: None if it is not known, or is no member of the deployment any more.
        has_begun: whether its engine may have worked on the call. False if that is not known.
        is_process_gone: whether the process around the engine has ended, or its connection.
    """

    def __init__(
        self, error: RankletError, replica: str | None, *, has_begun: bool = False, is_process_gone: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.replica = replica
        self.has_begun = has_begun
        self.is_process_gone = is_process_gone


def _translate(error: Exception, replica: str | None) -> Exception:
    if isinstance(error, BackPressureError):
        return Saturated("expected space in the queue of the replicas (max_queued_requests), got none. Try again")
    if isinstance(error, _LOST) or (isinstance(error, grpc.aio.AioRpcError) and error.code() in _LOST_CODES):
        return RepeatableError(_lost("died"), replica, is_process_gone=True)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("expected a replica, but none is up (deployment unhealthy). See `serve status`")
    return InternalError(f"the replica failed unexpectedly: {summary(error)}")


def summary(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"[:300]
