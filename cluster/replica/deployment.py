"""The Serve deployment around one engine: translates between engine, router and gateways."""

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
from ranklet.cluster.exporter import start_exporter
from ranklet.cluster.message import EmbedResult, InferenceCall, InferenceReply, Refusal, ReplicaDescription
from ranklet.cluster.replica.gateways_client import GatewaysClient
from ranklet.cluster.replica.metrics import ReplicaMetrics
from ranklet.cluster.replica.publisher import StatePublisher
from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, AdapterReport
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import AdapterChanged, InternalError, RankletError
from ranklet.replicas.process.process import EngineProcess
from ranklet.routing.hint import RoutingHint
from ranklet.routing.report import RANK, QueueLoad

_BLOCKING_THREADS = 8  # blocking calls of the engine, mostly loads, that run at the same time
_RELEASE_POLL_S = 0.02
_RELEASE_RETRY_S = 60.0
_ATTEMPTS = 3  # to use an adapter whose files change

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


class Replica:
    """Answers `InferenceCall`s with one engine on one device. The engine runs in a process of its own."""

    def __init__(self, args: AppArgs) -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._rank = context.rank.rank if context.rank else 0
        metrics, config, sources = ReplicaMetrics(args.metrics.top_adapters), args.engine_config(), args.sources
        self._state = ReplicaState(self._id, config.slots, config.max_rank)
        self._engine = EngineProcess(config, metrics, self._state)
        self._engine.start()
        metrics.watch(self._engine.snapshot, self._engine.pid)
        self._pins = Registry(args.adapters_dir, args.adapters).pins()
        cache = RemoteCache(sources.cache_dir, sources.cache_bytes, sources.max_adapter_bytes, metrics.downloaded)
        self._resolver = AdapterResolver(cache, config.load_timeout_s)
        self._metrics_target = start_exporter(metrics.registry, args.metrics)
        self._threads = ThreadPoolExecutor(_BLOCKING_THREADS, thread_name_prefix="engine-call")
        self._tasks: set[asyncio.Task[None]] = set()
        gateways = GatewaysClient(context.app_name)
        self._publisher = StatePublisher(self._state, gateways.send, self._engine.at_work)
        self._is_publishing = False
        logger.info(
            "replica %s (rank %d) serves %s, metrics on %s",
            self._id, self._rank, args.base_names[0], self._metrics_target,
        )  # fmt: skip

    async def embed(self, call: InferenceCall[EmbedParams], hint: RoutingHint) -> InferenceReply[EmbedResult] | Refusal:
        """Compute the vectors of a call. Cancellation drops the prompts that have not reached the device.

        Args:
            hint: read by the router only.
        """
        work = call.total_tokens  # embeddings: one unit per prompt token
        outcome: Answer | RankletError
        resolved: ResolvedAdapter | None = None
        self._state.call_arrived(call.sender, work)
        try:
            if call.adapter is None:
                outcome = await self._compute(call, None)
            else:
                resolved, outcome = await self._use(call.adapter, partial(self._compute, call))
        except RankletError as error:
            outcome = error
        except Exception as error:
            logger.exception("a call failed")
            outcome = InternalError(f"the replica failed: {type(error).__name__}: {error}")
        finally:
            self._state.call_finished(work)
        load = self._state.load_for(call.sender)
        if isinstance(outcome, RankletError):
            return Refusal.of(outcome, self._id, call.adapter_name or "", load)
        return self._reply(outcome, resolved, load)

    async def load(self, name: str, source: str, pins: tuple[str, ...], hint: RoutingHint) -> AdapterInfo | Refusal:
        """Verify an adapter and load it into a slot. Afterwards, only the adapters in `pins` are pinned."""
        try:
            await self._on_thread(self._engine.pin, pins)
            self._resolver.invalidate(name)
            return (await self._use(AdapterLocation(name, source), self._load_adapter))[1]
        except RankletError as error:
            return Refusal.of(error, self._id, name, None)

    async def release(self, name: str, keep: str | None, timeout_s: float) -> bool:
        """Free the slots of all revisions of an adapter except `keep`.

        Returns:
            Whether they were freed within `timeout_s`. If not, the release continues in the background.
        """
        self._resolver.invalidate(name)
        if await self._release_within(name, keep, timeout_s):
            return True
        self._spawn(self._release_later(name, keep))
        return False

    async def _release_within(self, name: str, keep: str | None, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while not await self._on_thread(self._engine.release, name, keep):
            if loop.time() > deadline_s:
                return False
            await asyncio.sleep(_RELEASE_POLL_S)
        return True

    async def _release_later(self, name: str, keep: str | None) -> None:
        # If requests load the adapter again in this time, that copy is freed once too.
        with contextlib.suppress(RankletError, TimeoutError):
            await self._release_within(name, keep, _RELEASE_RETRY_S)

    async def pin(self, pins: dict[str, str]) -> None:
        """Pin these adapters, given by name and source, and load those that have no slot."""
        try:
            await self._on_thread(self._engine.pin, tuple(pins))
        except RankletError as error:
            logger.error("pinned adapters: %s", error.message)
        for name, source in pins.items():
            self._spawn(self._preload(name, source))

    async def report(self) -> tuple[str, list[AdapterReport]]:
        return self._id, await self._on_thread(self._engine.report)

    async def prefetch(self, name: str, source: str, hint: RoutingHint) -> None:
        """Start to load an adapter ahead of its requests, if a slot is spare."""
        self._spawn(self._prefetch(name, source))

    async def _prefetch(self, name: str, source: str) -> None:
        with contextlib.suppress(RankletError):  # the next request for the adapter gets the error
            self._engine.prefetch((await self._resolver.resolve(name, source)).adapter)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _use(
        self, location: AdapterLocation, use: Callable[[AdapterRef], Awaitable[T]]
    ) -> tuple[ResolvedAdapter, T]:
        """Call `use` with the adapter's current revision. Call it again if the files change in the meantime.

        Raises:
            UnknownModel: another revision was requested.
            RankletError: raised by `use`; AdapterChanged if the files change during each attempt.
        """
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(AdapterChanged):
                return await self._use_once(location, use)
            self._resolver.invalidate(location.name)
        return await self._use_once(location, use)

    async def _use_once(
        self, location: AdapterLocation, use: Callable[[AdapterRef], Awaitable[T]]
    ) -> tuple[ResolvedAdapter, T]:
        resolved = await self._resolver.resolve(location.name, location.source)
        location.check_revision(resolved.adapter.revision)
        return resolved, await use(resolved.adapter)

    async def _load_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        return await self._on_thread(self._engine.load, adapter)

    async def _compute(self, call: InferenceCall[EmbedParams], adapter: AdapterRef | None) -> Answer:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def resolve(result: Answer | RankletError) -> None:
            if answer.done():  # cancelled
                return
            if isinstance(result, RankletError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        def done(result: Answer | RankletError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(resolve, result)

        ticket = self._engine.submit(call.prompts(), adapter, call.params, AnswerSink(done))
        try:
            return await answer
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def _reply(self, answer: Answer, resolved: ResolvedAdapter | None, load: QueueLoad) -> InferenceReply[EmbedResult]:
        return InferenceReply(
            result=EmbedResult(answer.result.tobytes(), answer.result.shape[1]),
            prompt_tokens=answer.prompt_tokens,
            tier="remote" if resolved and resolved.downloaded and answer.tier == "disk" else answer.tier,
            backend=answer.backend,
            replica=self._id,
            revision=resolved.adapter.revision if resolved else None,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            load=load,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the adapters of `user_config: {adapters: ...}` ahead of their first request. Errors are logged."""
        for name, path in AdapterList.model_validate(user_config).adapters.items():
            self._spawn(self._preload(name, str(path.absolute())))

    async def _preload(self, name: str, source: str) -> None:
        try:
            _, info = await self._use(AdapterLocation(name, source), self._load_adapter)
            logger.info("adapter %s: rank %d, %d bytes", name, info.rank, info.bytes)
        except RankletError as error:
            logger.error("adapter %s not loaded: %s", name, error.message)
        except Exception:
            logger.exception("adapter %s not loaded", name)

    async def describe(self) -> ReplicaDescription:
        return ReplicaDescription(
            id=self._id,
            rank=self._rank,
            pid=os.getpid(),
            problem=self._engine.problem(),
            metrics_target=self._metrics_target,
            limits=self._engine.limits,
            resident=self._engine.held().resident,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for `ranklet.cluster.autoscaling`."""
        return {BUSY: self._state.busy(), WAIT_S: self._state.wait_s()}

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve, which passes the result to routers. A replacement of this replica gets the same rank."""
        return {RANK: self._rank}

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after three failures in a row."""
        if not self._is_publishing:  # Serve calls this once the replica has started
            self._is_publishing = True
            self._spawn(self._publisher.run())
            self._spawn(self.pin(self._pins))
        problem = self._engine.problem()
        if problem is not None:
            raise RuntimeError(f"{problem}; replacing this replica")

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()
