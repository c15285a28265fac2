"""One engine as a Serve deployment: the only translator between the engine, the router and the gateways."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ray import serve

from ranklet.cluster.autoscaling import BUSY, WAIT_S
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.resolver import AdapterResolver, ResolvedAdapter
from ranklet.cluster.config import AdapterList, AppArgs
from ranklet.cluster.exporter import Exporter
from ranklet.cluster.message import EmbedResult, InferenceCall, InferenceReply, Refusal, ReplicaDescription
from ranklet.cluster.replica.metrics import ReplicaMetrics
from ranklet.cluster.replica.publisher import StatePublisher
from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.engine.stats import AdapterReport
from ranklet.replicas.errors import AdapterChanged, InternalError, RankletError
from ranklet.replicas.process.process import EngineProcess
from ranklet.routing.hint import RoutingHint
from ranklet.routing.report import QueueLoad

GATEWAY = "Gateway"  # the deployment that is told how this one stands
_LOADERS = 8  # adapters that somebody waits for, brought at once
_RELEASE_POLL_S = 0.02
_RELEASE_LATER_S = 60.0
_TRIES = 3  # at using an adapter whose files change

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


class Replica:
    """Answers `InferenceCall`s with one engine on one device, which has a process of its own."""

    def __init__(self, args: AppArgs) -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._rank = context.rank.rank if context.rank else 0
        metrics, config = ReplicaMetrics(args.metrics.top_adapters), args.engine_config()
        self._standing = ReplicaState(self._id, config.slots, config.max_rank)
        self._engine = EngineProcess(config, metrics, self._standing)
        self._engine.start()
        metrics.watch(self._engine.snapshot, self._engine.pid)
        pinned = Registry(args.adapters_dir, args.adapters).pins()
        self._pins = pinned
        sources = args.sources
        cache = RemoteCache(sources.cache_dir, sources.cache_bytes, sources.max_adapter_bytes, metrics.fetched)
        self._resolver = AdapterResolver(cache, config.load_timeout_s)
        self._target = Exporter.start(metrics.registry, args.metrics).target
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="warm")
        self._tasks: set[asyncio.Task[None]] = set()
        self._herald = StatePublisher(self._standing, GATEWAY, context.app_name, self._look, self._engine.at_work)
        self._is_heralded = False
        logger.info(
            "replica %s (rank %d) serves %s, metrics on %s", self._id, self._rank, args.base_names[0], self._target
        )

    async def embed(self, call: InferenceCall[EmbedParams], hint: RoutingHint) -> InferenceReply[EmbedResult] | Refusal:
        """The vectors of a call, or why not. Cancelled, it drops what has not reached the device.

        Args:
            hint: read by the router, not here.
        """
        tokens = call.total_tokens
        outcome: Answer | RankletError
        found: ResolvedAdapter | None = None
        self._standing.arrived(call.sender, tokens)
        try:
            if call.adapter is None:
                outcome = await self._answer(call, None)
            else:
                found, outcome = await self._with(call.adapter, partial(self._answer, call))
        except RankletError as error:
            outcome = error
        except Exception as error:
            logger.exception("embed failed")
            outcome = InternalError(f"the replica failed: {type(error).__name__}: {error}")
        finally:
            self._standing.settled(tokens)
        load = self._standing.now(call.sender)
        if isinstance(outcome, RankletError):
            return Refusal.of(outcome, self._id, call.adapter_name or "", load)
        return self._reply(outcome, found, load)

    async def load(self, name: str, path: str, pins: tuple[str, ...], hint: RoutingHint) -> AdapterInfo | Refusal:
        """Verify an adapter and bring it into a slot; `pins` are those that may keep theirs from now on."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._loaders, self._engine.pin, pins)
            self._resolver.forget(name)
            return (await self._with(AdapterLocation(name, path), self._bring))[1]
        except RankletError as error:
            return Refusal.of(error, self._id, name, None)

    async def release(self, name: str, keep: str | None, timeout_s: float) -> bool:
        """Free what is held of an adapter, but for the revision `keep`; whether nothing is left within `timeout_s`."""
        self._resolver.forget(name)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while not await loop.run_in_executor(self._loaders, self._engine.release, name, keep):
            if loop.time() > deadline_s:
                self._keep(self._release_later(name, keep))
                return False
            await asyncio.sleep(_RELEASE_POLL_S)
        return True

    async def _release_later(self, name: str, keep: str | None) -> None:
        """Of an adapter that is asked for again meanwhile, this frees once what requests then bring back."""
        with contextlib.suppress(RankletError, TimeoutError):
            loop, tries = asyncio.get_running_loop(), int(_RELEASE_LATER_S / _RELEASE_POLL_S)
            for _ in range(tries):
                await asyncio.sleep(_RELEASE_POLL_S)
                if await loop.run_in_executor(self._loaders, self._engine.release, name, keep):
                    return

    async def pin(self, pins: dict[str, str]) -> None:
        """Keep these adapters, by name and folder, in slots: they are loaded where they are in none."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._loaders, self._engine.pin, tuple(pins))
        except RankletError as error:
            logger.error("pinned adapters: %s", error.message)
        for name, path in pins.items():
            self._keep(self._warm(name, path))

    async def report(self) -> tuple[str, list[AdapterReport]]:
        """This replica's id, and what it holds."""
        return self._id, await asyncio.get_running_loop().run_in_executor(self._loaders, self._engine.report)

    async def prefetch(self, name: str, path: str, hint: RoutingHint) -> None:
        """Bring an adapter into a slot ahead of its requests, if there is one to spare; returns at once."""
        self._keep(self._offer(name, path))

    async def _offer(self, name: str, path: str) -> None:
        with contextlib.suppress(RankletError):  # it is told to whoever asks for it
            self._engine.offer((await self._resolver.resolve(name, path)).adapter)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _look(self) -> None:
        self._standing.holds(self._engine.held())

    async def _with(
        self, known: AdapterLocation, use: Callable[[AdapterRef], Awaitable[T]]
    ) -> tuple[ResolvedAdapter, T]:
        """Use an adapter as it is on this node now, and again if its files turn out to be others.

        Raises:
            UnknownModel: another revision was asked for.
            RankletError: what `use` raises; AdapterChanged if files change at every try.
        """
        tries = _TRIES
        while True:
            found = await self._resolver.resolve(known.name, known.source)
            known.check_revision(found.adapter.revision)
            try:
                return found, await use(found.adapter)
            except AdapterChanged:
                tries -= 1
                if not tries:
                    raise
                self._resolver.forget(known.name)

    async def _bring(self, adapter: AdapterRef) -> AdapterInfo:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, self._engine.load, adapter)

    async def _answer(self, call: InferenceCall[EmbedParams], adapter: AdapterRef | None) -> Answer:
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

        ticket = self._engine.submit(call.prompts(), adapter, call.params.dimensions, done)
        try:
            return await settled
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def _reply(self, answer: Answer, found: ResolvedAdapter | None, load: QueueLoad) -> InferenceReply[EmbedResult]:
        return InferenceReply(
            result=EmbedResult(answer.vectors.tobytes(), answer.vectors.shape[1]),
            prompt_tokens=answer.prompt_tokens,
            tier="remote" if found and found.downloaded and answer.tier == "disk" else answer.tier,
            backend=answer.backend,
            replica=self._id,
            revision=found.adapter.revision if found else None,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            load=load,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config: {adapters: ...}` of this deployment: loads those adapters now, ahead of their first request.

        Which adapters may be asked for is the gateways' business. One that cannot be loaded is logged, and refused when
        it is asked for.
        """
        adapters = AdapterList.model_validate(user_config).adapters
        for name, path in adapters.items():
            self._keep(self._warm(name, str(path.absolute())))

    async def _warm(self, name: str, path: str) -> None:
        try:
            _, info = await self._with(AdapterLocation(name, path), self._bring)
            logger.info("adapter %s: rank %d, %d bytes", name, info.rank, info.bytes)
        except RankletError as error:
            logger.error("adapter %s not loaded: %s", name, error.message)
        except Exception:
            logger.exception("adapter %s not loaded", name)

    async def describe(self) -> ReplicaDescription:
        """Called by gateways."""
        return ReplicaDescription(
            id=self._id,
            rank=self._rank,
            pid=os.getpid(),
            healthy=self._engine.healthy(),
            metrics_target=self._target,
            limits=self._engine.limits,
            resident=self._engine.resident(),
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ranklet.cluster.autoscaling` decides by."""
        return {BUSY: self._standing.busy(), WAIT_S: self._standing.wait_s()}

    async def record_replica_metadata(self) -> dict[str, Any]:
        """The rank, which a replacement of this replica gets again."""
        return {"rank": self._rank}

    async def check_health(self) -> None:
        """Called by Serve; three failures in a row and the replica is replaced."""
        if not self._is_heralded:  # now that there is an event loop, and Serve knows this replica
            self._is_heralded = True
            self._keep(self._herald.run())
            self._keep(self.pin(self._pins))
        if not self._engine.healthy():
            raise RuntimeError("the engine has stopped; replacing this replica")

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()
