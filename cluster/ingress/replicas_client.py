"""Calls from a gateway to the replicas: splits requests, repeats a failed call once, and cancels abandoned calls."""

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.broadcast import CONTROL_TIMEOUT_S, broadcast
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.watchdog import Watchdog
from ranklet.cluster.message import InferenceCall, InferenceReply, Refusal, ReplicaDescription, pack, split
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterReport
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InternalError, RankletError, Saturated, Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT, RoutingHint

# The replica or its connection is gone. Embeddings are idempotent, so the call may be repeated.
_LOST = (RayActorError, TaskCancelledError, RequestCancelledError)
_LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_CONTROL_ERRORS = (RayError, RayServeException, grpc.RpcError, TimeoutError)


class ReplicasClient:
    """Client of the application's replicas.

    Args:
        on_retry: called for each repeated call.
        sender: id of this gateway.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", affinity: Affinity, limits: LimitsConfig, on_retry: Callable[[], None],
        sender: str,
    ) -> None:  # fmt: skip
        self._handle = handle
        self._affinity = affinity
        self._timeout_s = limits.request_timeout_s
        self._no_replica_timeout_s = limits.no_replica_timeout_s
        self._on_retry = on_retry
        self._sender = sender
        self._hint_ids = itertools.count()
        self._limits: RequestLimits | None = None
        self.watchdog = Watchdog(affinity, self._prefetch, limits.no_replica_timeout_s)

    async def infer(
        self, method: str, adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], params: Any,
        result_bytes: int,
    ) -> list[InferenceReply[Any]]:  # fmt: skip
        """Call `method` of the replicas. A large request is split into several calls.

        Args:
            prompts: int32 [length] each.
            params: parameters of the task, such as `EmbedParams`.
            result_bytes: size of the result of one prompt.

        Returns:
            The replies to the calls, in the order of the prompts.

        Raises:
            Unavailable: no replica answered in time, or two replicas failed.
            RankletError: a replica returned this error.
        """
        calls = [pack(adapter, part, params, self._sender) for part in split(prompts, result_bytes)]
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send_all(method, calls)
        except TimeoutError:
            raise Unavailable(
                f"expected an answer within {self._timeout_s:g} s (limits.request_timeout_s), got none. The cluster is "
                "overloaded, or its replicas are starting. Try again"
            ) from None

    async def describe(self) -> ReplicaDescription:
        """Describe any one replica.

        Raises:
            Unavailable: none answered.
        """
        description: ReplicaDescription = await self._control("describe", timeout_s=CONTROL_TIMEOUT_S)
        return description

    async def limits(self) -> RequestLimits:
        """Return the limits of the engines, which are fetched once.

        Raises:
            Unavailable: no replica has answered yet.
        """
        if self._limits is None:
            self._limits = (await self.describe()).limits
        return self._limits

    async def describe_all(self) -> list[ReplicaDescription]:
        """Describe all live replicas, without those that do not answer."""
        return await broadcast(self._handle, "describe")

    async def load(self, adapter: AdapterLocation, pins: Sequence[str]) -> AdapterInfo:
        """Verify an adapter and load it into a slot of the replica that the router chooses.

        Args:
            pins: names of all adapters that keep their slots from now on.

        Raises:
            Unavailable: no replica answers.
            RankletError: the adapter cannot be served.
        """
        hint = RoutingHint(next(self._hint_ids), adapter.name)
        arguments = (adapter.name, adapter.source, tuple(pins))
        result = await self._control("load", *arguments, timeout_s=self._timeout_s, **{HINT: hint})
        if isinstance(result, Refusal):
            raise result.error()
        assert isinstance(result, AdapterInfo)
        return result

    async def release(self, name: str, keep: str | None, timeout_s: float = 0.0) -> bool:
        """Free an adapter on all replicas, except for the revision `keep`.

        Returns:
            Whether each replica freed the adapter's other revisions within `timeout_s`.
        """
        arguments, wait_s = (name, keep, timeout_s), timeout_s + CONTROL_TIMEOUT_S
        return all(await broadcast(self._handle, "release", *arguments, timeout_s=wait_s, missing=[False]))

    async def pin(self, pins: Mapping[str, str]) -> None:
        """Keep these adapters, given as name and source, in slots of all replicas."""
        await broadcast(self._handle, "pin", dict(pins))

    async def reports(self) -> list[tuple[str, list[AdapterReport]]]:
        """Return the id of each live replica and the adapters that it holds."""
        return await broadcast(self._handle, "report")

    async def _control(self, method: str, *arguments: Any, timeout_s: float, **hint: RoutingHint) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._handle.options(method_name=method).remote(*arguments, **hint)
        except _CONTROL_ERRORS as error:
            raise Unavailable(f"expected an answer from a replica, got {_summary(error)}") from error

    async def _send_all(self, method: str, calls: Sequence[InferenceCall[Any]]) -> list[InferenceReply[Any]]:
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

    async def _send(self, method: str, call: InferenceCall[Any]) -> InferenceReply[Any]:
        try:
            return await self._attempt(method, call, avoid=None)
        except _RepeatableError as first:
            self._on_retry()
            try:
                return await self._attempt(method, call, avoid=first.replica)
            except _RepeatableError as second:
                raise second.error from first

    async def _attempt(self, method: str, call: InferenceCall[Any], avoid: str | None) -> InferenceReply[Any]:
        work = call.total_tokens  # embeddings: one unit per prompt token
        hint = RoutingHint(next(self._hint_ids), call.adapter_name, work, avoid, location=call.adapter)
        result: InferenceReply[Any] | Refusal | None = None
        self.watchdog.watch(hint.id)
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
            self.watchdog.unwatch(hint.id)
            self._complete(hint, result)
        if isinstance(result, InferenceReply):
            return result
        refusal = result.error()
        raise _RepeatableError(refusal, result.replica) if isinstance(refusal, Unavailable | Saturated) else refusal

    def _raise_if_abandoned(self, hint_id: int) -> None:
        abandoned = self.watchdog.abandoned(hint_id)
        if abandoned is None:
            return
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        if abandoned.replica is not None:
            raise _RepeatableError(_lost("hangs"), abandoned.replica) from None
        raise Unavailable(
            f"expected a replica within {self._no_replica_timeout_s:g} s (limits.no_replica_timeout_s), but none is "
            "up. Try again"
        ) from None

    def _complete(self, hint: RoutingHint, result: InferenceReply[Any] | Refusal | None) -> None:
        if result is None:
            self._affinity.complete(hint.id)
        else:
            age_s = time.time() - result.load.at_s if result.load else 0.0
            self._affinity.complete(hint.id, result.replica, result.load, age_s)

    async def _prefetch(self, adapter: AdapterLocation, replica: str) -> None:
        hint = {HINT: RoutingHint(next(self._hint_ids), only=replica)}
        with contextlib.suppress(Unavailable):  # requests load the adapter themselves if the prefetch fails
            await self._control("prefetch", adapter.name, adapter.source, timeout_s=CONTROL_TIMEOUT_S, **hint)


def _lost(reason: str) -> Unavailable:
    return Unavailable(f"the replica that computed the request {reason}, and no other could answer. Try again")


class _RepeatableError(Exception):
    """A failure of one replica. The call may be repeated on another; `error` is raised if that fails too."""

    def __init__(self, error: RankletError, replica: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.replica = replica


def _translate(error: Exception, replica: str | None) -> Exception:
    if isinstance(error, BackPressureError):
        return Saturated("expected space in the queue of the replicas (max_queued_requests), got none. Try again")
    if isinstance(error, _LOST) or (isinstance(error, grpc.aio.AioRpcError) and error.code() in _LOST_CODES):
        return _RepeatableError(_lost("died"), replica)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("expected a replica, but none is up (deployment unhealthy). See `serve status`")
    return InternalError(f"the replica failed unexpectedly: {_summary(error)}")


def _summary(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"[:300]
