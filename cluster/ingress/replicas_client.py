"""Calls from a gateway to the replicas: split, send, retry once elsewhere, join; cancelled when the client goes."""

import asyncio
import contextlib
import contextvars
import itertools
import logging
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
from ranklet.cluster.ingress.answers import Embeddings, join
from ranklet.cluster.message import EmbedResult, InferenceCall, InferenceReply, Refusal, ReplicaDescription, pack, split
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterReport
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import InternalError, RankletError, Saturated, Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT, RoutingHint

_WATCH_S = 0.02  # between two looks at orders and hung replicas
_MOST_PREFETCHES = 64
logger = logging.getLogger("ray.serve")

_EmbedCall = InferenceCall[EmbedParams]
_EmbedReply = InferenceReply[EmbedResult]

# The replica, or the way to it, is gone. Embedding twice does no harm, so the call may be repeated.
_GONE = (RayActorError, TaskCancelledError, RequestCancelledError)


class ReplicasClient:
    """The engine replicas of this application, as one gateway reaches them.

    Args:
        timeout_s: for an answer.
        patience_s: for a replica, where there is none.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", affinity: Affinity, timeout_s: float, retried: Callable[[], None],
        sender: str = "", patience_s: float = 6.0,
    ) -> None:  # fmt: skip
        self._handle = handle
        self._affinity = affinity
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._retried = retried
        self._sender = sender
        self._hint_ids = itertools.count()
        self._at_work: dict[int, tuple[asyncio.Task[Any], float]] = {}  # calls, and since when
        self._abandoned: dict[int, str | None] = {}  # calls, and the replica that hangs; None: none is up
        self._prefetches: set[asyncio.Task[None]] = set()

    async def embed(
        self, adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], dimensions: int | None, hidden: int
    ) -> Embeddings:
        """Vectors for `prompts` (int32 [length] each), in order.

        Raises:
            RankletError: what the replica refused, Unavailable when none answered in time or two failed, Saturated.
        """
        params = EmbedParams(dimensions)
        calls = [pack(adapter, part, params, self._sender) for part in split(prompts, 4 * hidden)]
        try:
            async with asyncio.timeout(self._timeout_s):
                return join(await self._all(calls))
        except TimeoutError:
            raise Unavailable(
                f"expected an answer within {self._timeout_s:g} s (limits.request_timeout_s), got none; the cluster is "
                "overloaded or its replicas are starting. Try again"
            ) from None

    async def describe(self) -> ReplicaDescription:
        """Describe any one replica.

        Raises:
            Unavailable: none answered.
        """
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                description: ReplicaDescription = await self._handle.options(method_name="describe").remote()
                return description
        except (RayError, RayServeException, grpc.RpcError, TimeoutError) as error:
            raise Unavailable(f"expected an answer from a replica, got {_said(error)}") from error

    async def describe_all(self) -> list[ReplicaDescription]:
        """Describe all live replicas; those that do not answer are left out."""
        return await broadcast(self._handle, "describe")

    async def load(self, adapter: AdapterLocation, pins: Sequence[str]) -> AdapterInfo:
        """Verify an adapter and bring it into a slot of its home; `pins` may then stay in theirs.

        Raises:
            RankletError: why it cannot be served, or Unavailable when no replica answers.
        """
        hint = RoutingHint(next(self._hint_ids), adapter.name)
        order = self._handle.options(method_name="load")
        try:
            async with asyncio.timeout(self._timeout_s):
                said = await order.remote(adapter.name, adapter.source, tuple(pins), **{HINT: hint})
        except (RayError, RayServeException, grpc.RpcError, TimeoutError) as error:
            raise Unavailable(f"expected an answer from a replica, got {_said(error)}") from error
        if isinstance(said, Refusal):
            raise said.error()
        assert isinstance(said, AdapterInfo)
        return said

    async def release(self, name: str, keep: str | None, timeout_s: float = 0.0) -> bool:
        """Have all replicas free what they hold of an adapter, but for one revision.

        Returns:
            Whether nothing else of it was left within `timeout_s`.
        """
        patience_s = timeout_s + CONTROL_TIMEOUT_S
        arguments = (name, keep, timeout_s)
        return all(await broadcast(self._handle, "release", *arguments, timeout_s=patience_s, missing=[False]))

    async def pin(self, pins: Mapping[str, str]) -> None:
        """Have all replicas keep these adapters, by name and folder, in their slots."""
        await broadcast(self._handle, "pin", dict(pins))

    async def reports(self) -> list[tuple[str, list[AdapterReport]]]:
        """What each live replica holds, by its id."""
        return await broadcast(self._handle, "report")

    async def _all(self, calls: Sequence[_EmbedCall]) -> list[_EmbedReply]:
        if len(calls) == 1:
            return [await self._call(calls[0])]
        # Ray 2.60 tells calls that wait for a replica apart by the id of the HTTP request they serve: of two under one
        # id, the second waits for ever. In an empty context each gets an id of its own.
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._call(call), context=contextvars.Context()) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # after one refusal, the rest would be work for nobody
                task.cancel()

    async def _call(self, call: _EmbedCall) -> _EmbedReply:
        try:
            return await self._attempt(call, avoid=None)
        except _RepeatableError as failure:
            self._retried()
            try:
                return await self._attempt(call, avoid=failure.replica)
            except _RepeatableError as second:
                raise second.error from failure

    async def _attempt(self, call: _EmbedCall, avoid: str | None) -> _EmbedReply:
        work = call.total_tokens  # embeddings: one unit per prompt token
        hint = RoutingHint(next(self._hint_ids), call.adapter_name, work, avoid, location=call.adapter)
        result: _EmbedReply | Refusal | None = None
        task = _this_task()
        self._at_work[hint.id] = task, time.monotonic()
        # Not as a multiplexed model id: Ray 2.60 keeps every call that has one, unless its own multiplexing routes it.
        response = self._handle.options(method_name="embed").remote(call, **{HINT: hint})
        try:
            result = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            if hint.id not in self._abandoned:
                raise
            task.uncancel()
            hung = self._abandoned[hint.id]
            if hung is None:
                raise Unavailable(
                    f"expected a replica within {self._patience_s:g} s (limits.no_replica_timeout_s), but none is up. "
                    "Try again"
                ) from None
            raise _RepeatableError(_gone("hangs"), hung) from None
        except Exception as error:
            raise _translated(error, self._affinity.replica_of(hint.id)) from error
        finally:
            del self._at_work[hint.id]
            self._abandoned.pop(hint.id, None)
            self._complete(hint, result)
        if isinstance(result, InferenceReply):
            return result
        refused = result.error()
        repeatable = isinstance(refused, Unavailable | Saturated)
        raise _RepeatableError(refused, result.replica) if repeatable else refused

    def _complete(self, hint: RoutingHint, result: _EmbedReply | Refusal | None) -> None:
        if result is None:
            self._affinity.complete(hint.id)
        else:
            age_s = time.time() - result.load.at_s if result.load else 0.0
            self._affinity.complete(hint.id, result.replica, result.load, age_s)

    async def watch(self) -> None:
        """Look after the calls under way, and pass the router's orders on, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                self._abandon()
                for order in self._affinity.pop_prefetch_orders():
                    if isinstance(order.location, AdapterLocation) and len(self._prefetches) < _MOST_PREFETCHES:
                        prefetch = self._prefetch(order.location, order.replica)
                        task = loop.create_task(prefetch, context=contextvars.Context())
                        self._prefetches.add(task)
                        task.add_done_callback(self._prefetches.discard)
            except Exception:
                logger.exception("watching over calls failed; going on")

    def _abandon(self) -> None:
        """Take back what replicas owe that have been silent for too long, and what waits in vain for a replica."""
        now_s = time.monotonic()
        for id, replica in self._affinity.stranded(self._at_work).items():
            task, since_s = self._at_work[id]
            given_up = replica is not None or now_s - since_s > self._patience_s
            if given_up and id not in self._abandoned:
                self._abandoned[id] = replica
                task.cancel()

    async def _prefetch(self, adapter: AdapterLocation, replica: str) -> None:
        """Have a replica load an adapter ahead of its requests. Nothing depends on it: failures are ignored."""
        hint = RoutingHint(next(self._hint_ids), only=replica)
        order = self._handle.options(method_name="prefetch")
        with contextlib.suppress(RayError, RayServeException, grpc.RpcError, TimeoutError):
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                await order.remote(adapter.name, adapter.source, **{HINT: hint})


def _this_task() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None, "called outside of a task"
    return task


def _gone(what: str) -> Unavailable:
    return Unavailable(f"the replica that had the request {what}, and no other could answer. Try again")


class _RepeatableError(Exception):
    """A call that another replica may answer; `error` is what to say if none does."""

    def __init__(self, error: RankletError, replica: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.replica = replica


def _translated(error: Exception, replica: str | None) -> Exception:
    """Ray's failures in ranklet's words."""
    if isinstance(error, BackPressureError):
        return Saturated(
            "expected room in the queue of the replicas, got none (max_queued_requests). Try again shortly"
        )
    if isinstance(error, _GONE) or (isinstance(error, grpc.aio.AioRpcError) and error.code() in _GONE_CODES):
        return _RepeatableError(_gone("died"), replica)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("expected a replica, but none is up (deployment unhealthy). Look at `serve status`")
    return InternalError(f"the replica failed in an unexpected way: {_said(error)}")


_GONE_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"[:300]
