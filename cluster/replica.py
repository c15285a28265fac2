"""One engine as a Serve deployment: the only translator between the engine, the router and the gateways."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from typing import Any

from ray import serve

from ranklet.cluster.config import AdapterList, AppArgs
from ranklet.cluster.exporter import Exporter
from ranklet.cluster.message import EmbedCall, EmbedRefusal, EmbedReply
from ranklet.cluster.metrics import ReplicaMetrics
from ranklet.replicas.call import Answer
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.process import EngineProcess
from ranklet.replicas.reference import AdapterRef, revision_of

_REVISION_HOLDS_S = 1.0  # how long a folder's revision is believed before its files are looked at again

logger = logging.getLogger("ray.serve")


class Replica:
    """Answers `EmbedCall`s with one engine on one device, which has a process of its own."""

    def __init__(self, args: AppArgs) -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._rank = context.rank.rank if context.rank else 0
        metrics = ReplicaMetrics(args.metrics.top_adapters)
        self._engine = EngineProcess(args.engine_config(), metrics)
        self._engine.start()
        metrics.watch(self._engine.snapshot)
        self._target = Exporter.start(metrics.registry, args.metrics).target
        self._references: dict[tuple[str, str], tuple[float, AdapterRef]] = {}
        self._warming: set[asyncio.Task[None]] = set()
        logger.info(
            "replica %s (rank %d) serves %s, metrics on %s", self._id, self._rank, args.base_names[0], self._target
        )

    async def embed(
        self, call: EmbedCall, adapter: str | None = None, avoid: str | None = None
    ) -> EmbedReply | EmbedRefusal:
        """The vectors of a call, or why not. Cancelled, it drops what has not reached the device.

        Args:
            adapter, avoid: read by the router, not here.
        """
        try:
            return self._reply(await self._answer(call))
        except RankletError as error:
            return EmbedRefusal.of(error, self._id, call.adapter or "")
        except Exception as error:
            logger.exception("embed failed")
            return EmbedRefusal.of(InternalError(f"the replica failed: {type(error).__name__}: {error}"), self._id, "")

    async def _answer(self, call: EmbedCall) -> Answer:
        adapter = await self._reference(call.adapter, call.path) if call.adapter and call.path else None
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[Answer] = loop.create_future()

        def settle(result: Answer | RankletError) -> None:
            if settled.done():  # cancelled meanwhile
                return
            if isinstance(result, RankletError):
                settled.set_exception(result)
            else:
                settled.set_result(result)

        def done(result: Answer | RankletError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended with this process
                loop.call_soon_threadsafe(settle, result)

        ticket = self._engine.submit(call.prompts(), adapter, call.dimensions, done)
        try:
            return await settled
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def _reply(self, answer: "Answer") -> EmbedReply:
        return EmbedReply(
            vectors=answer.vectors.tobytes(),
            dimensions=answer.vectors.shape[1],
            prompt_tokens=answer.prompt_tokens,
            tier=answer.tier,
            backend=answer.backend,
            replica=self._id,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
        )

    async def _reference(self, name: str, path: str) -> AdapterRef:
        """The adapter's present revision on this node; its files are looked at once a second, off the event loop."""
        checked_s, reference = self._references.get((name, path), (float("-inf"), None))
        if reference is None or time.monotonic() - checked_s > _REVISION_HOLDS_S:
            revision = await asyncio.get_running_loop().run_in_executor(None, revision_of, path)
            reference = AdapterRef(name, path, revision)
            self._references[name, path] = (time.monotonic(), reference)
        return reference

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config: {adapters: ...}` of this deployment: loads those adapters now, ahead of their first request.

        Which adapters may be asked for is the gateways' business. One that cannot be loaded is logged, and refused when
        it is asked for.
        """
        adapters = AdapterList.model_validate(user_config).adapters
        for name, path in adapters.items():
            task = asyncio.ensure_future(self._warm(name, str(path.absolute())))
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def _warm(self, name: str, path: str) -> None:
        try:
            reference = await self._reference(name, path)
            info = await asyncio.get_running_loop().run_in_executor(None, self._engine.load, reference)
            logger.info("adapter %s: rank %d, %d bytes", name, info.rank, info.bytes)
        except RankletError as error:
            logger.error("adapter %s not loaded: %s", name, error.message)
        except Exception:
            logger.exception("adapter %s not loaded", name)

    async def describe(self) -> dict[str, Any]:
        """This replica for gateways: identity, health, limits of the engine, metrics address."""
        return {
            "healthy": self._engine.healthy(),
            "role": "replica",
            "id": self._id,
            "rank": self._rank,
            "pid": os.getpid(),
            "metrics": self._target,
            "limits": dataclasses.asdict(self._engine.limits),
            "resident": list(self._engine.resident()),
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """Residency for the router. No counters or times: each change is broadcast to every gateway."""
        return {"resident": sorted(self._engine.resident())}

    async def record_replica_metadata(self) -> dict[str, Any]:
        """The rank, which a replacement of this replica gets again."""
        return {"rank": self._rank}

    async def check_health(self) -> None:
        """Called by Serve; three failures in a row and the replica is replaced."""
        if not self._engine.healthy():
            raise RuntimeError("the engine has stopped; replacing this replica")

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()
