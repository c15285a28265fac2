"""The Serve deployment around one engine: translates between engine, router and gateways."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.serve.schema import ReplicaRank

from ranklet.cluster.autoscaling import BUSY, FIRST_TOKEN_S, KV_USED, WAIT_S
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.remote_folder import RemoteFolder
from ranklet.cluster.catalog.resolver import AdapterResolver, ResolvedAdapter
from ranklet.cluster.catalog.source import AllowedSources
from ranklet.cluster.config import AdapterList, AppArgs
from ranklet.cluster.datapath import refuse_missing_token
from ranklet.cluster.exporter import start_exporter
from ranklet.cluster.logs import escape_log
from ranklet.cluster.message import AdapterText, EmbedResult, InferenceCall, InferenceReply, Refusal, ReplicaDescription
from ranklet.cluster.replica.adapter_texts import AdapterTexts
from ranklet.cluster.replica.calls import ReplicaCalls
from ranklet.cluster.replica.feeds import GatewayLost, OutgoingFeeds
from ranklet.cluster.replica.gateways_client import GatewaysClient
from ranklet.cluster.replica.lost_gateways import LostGateways, ended_actors
from ranklet.cluster.replica.metrics import ReplicaMetrics
from ranklet.cluster.replica.publisher import StatePublisher
from ranklet.cluster.replica.state import ReplicaState
from ranklet.cluster.settings.keeper import KeeperActor
from ranklet.cluster.settings.setting import Setting
from ranklet.cluster.settings.settings import Settings
from ranklet.cluster.settings.user_config import read_user_config
from ranklet.cluster.text_result import GenerateResult
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterReport
from ranklet.replicas.engine.params import EmbedParams, GenerateParams
from ranklet.replicas.errors import RankletError
from ranklet.replicas.process.process import EngineProcess
from ranklet.routing.hint import RoutingHint
from ranklet.routing.report import RANK, StateReport

_BLOCKING_THREADS = 8  # blocking calls of the engine, mostly loads, that run at the same time
_RELEASE_POLL_S = 0.02
_RELEASE_RETRY_S = 60.0

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


class Replica:
    """Answers `InferenceCall`s with one engine on one device. The engine runs in a process of its own."""

    def __init__(self, args: AppArgs) -> None:
        escape_log()
        refuse_missing_token(open_ray=args.security.open_ray)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._rank = context.rank.rank if context.rank else 0
        self._metrics = metrics = ReplicaMetrics(args.metrics.top_adapters, args.base_names[0])
        config, sources = args.engine_config(), args.sources
        self._state = ReplicaState(self._id, config.slots, config.max_rank, most_texts=config.max_batch_requests)
        self._feeds = OutgoingFeeds()
        self._engine = EngineProcess(config, metrics, self._state, self._feeds)
        self._engine.start()
        metrics.watch(self._engine.snapshot, self._engine.pid)
        self._settings = Settings(KeeperActor(context.app_name, context.deployment))
        metrics.registry.register(self._settings)
        self._user_config: Setting[AdapterList] = self._settings.setting("user_config", ValueError)
        self._pins = _pins(args)
        cache = RemoteCache(
            sources.cache_dir, sources.cache_bytes, sources.max_adapter_bytes, metrics.downloaded,
            open_folder=partial(RemoteFolder, allowed=sources.allowed),
        )  # fmt: skip
        self._resolver = AdapterResolver(cache, config.load_timeout_s, roots=args.adapter_roots)
        settings = AdapterSettings(config.model_dir)
        if config.added_tokens or self._engine.limits.no_text is None:
            settings.tokenizers.prepare()
        self._calls = ReplicaCalls(self._id, self._engine, self._resolver, self._state, self._feeds, settings)
        self._texts = AdapterTexts(config.model_dir, settings)
        self._metrics_target = start_exporter(metrics.registry, args.metrics)
        self._threads = ThreadPoolExecutor(_BLOCKING_THREADS, thread_name_prefix="engine-call")
        self._tasks: set[asyncio.Task[None]] = set()
        self._gateways = GatewaysClient(context.app_name)
        self._lost_gateways = LostGateways(self._feeds, partial(ended_actors, existing=self._id))
        self._publisher = StatePublisher(self._state, self._send_report, self._engine.at_work)
        self._is_publishing = False
        self._preloaded: dict[str, Path] = {}
        logger.info(
            "replica %s (rank %d) serves %s, metrics on %s",
            self._id, self._rank, args.base_names[0], self._metrics_target,
        )  # fmt: skip

    async def embed(self, call: InferenceCall[EmbedParams], hint: RoutingHint) -> InferenceReply[EmbedResult] | Refusal:
        """Compute the vectors of a call. Cancellation drops the prompts that have not reached the device.

        Args:
            hint: read by the router only.
        """
        return await self._calls.answer(call, EmbedResult.of)

    async def generate(
        self, call: InferenceCall[GenerateParams], hint: RoutingHint
    ) -> InferenceReply[GenerateResult] | Refusal:
        """Generate the texts of a call. Their pieces leave through the sender's feed before.

        They end early if the call is cancelled or its sender is lost.
        """
        try:
            async with self._feeds.call_from(call.sender):
                return await self._calls.answer(call, GenerateResult.of)
        except GatewayLost as error:
            logger.warning("a text of %s ends: %s", call.adapter_name or "the base model", error.message)
            self._metrics.on_gateway_lost(call.adapter_name)
            return Refusal.of(error, self._id, call.adapter_name or "", None)

    async def feed(self, gateway: str, replica: str, hint: RoutingHint) -> AsyncGenerator[list[bytes], None]:
        """Yield messages about the text calls of a gateway, see `OutgoingFeeds.read`.

        Args:
            replica: id of the replica that the feed is for. If that is gone, Serve sends the call to another one.
        """
        if replica == self._id:
            async with contextlib.aclosing(self._feeds.read(gateway)) as feed:
                async for messages in feed:
                    yield messages

    async def finish(self, gateway: str, texts: list[tuple[int, int]], hint: RoutingHint) -> None:
        """End texts, given by the number of their call and their index in it, with what they have."""
        for number, index in texts:
            self._calls.finish(gateway, number, index)

    async def text_description(self, name: str, source: str, hint: RoutingHint) -> AdapterText | Refusal:
        """Describe what the current revision of an adapter says about prompts and texts. Loads nothing."""
        try:
            return (await self._calls.use(AdapterLocation(name, source), self._describe_text))[1]
        except RankletError as error:
            return Refusal.of(error, self._id, name, None)

    async def _describe_text(self, resolved: ResolvedAdapter) -> AdapterText:
        return await self._on_thread(self._texts.describe, resolved.adapter)

    async def load(self, name: str, source: str, pins: tuple[str, ...], hint: RoutingHint) -> AdapterInfo | Refusal:
        """Verify an adapter and load it into a slot. Afterwards, only the adapters in `pins` are pinned."""
        try:
            await self._on_thread(self._engine.pin, pins)
            self._resolver.invalidate(name)
            return (await self._calls.use(AdapterLocation(name, source), self._load_adapter))[1]
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

    async def _send_report(self, report: StateReport) -> list[str]:
        reached = await self._gateways.send(report)
        self._lost_gateways.on_reached(reached)
        return reached

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _load_adapter(self, resolved: ResolvedAdapter) -> AdapterInfo:
        return await self._on_thread(self._engine.load, resolved.adapter)

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: ReplicaRank) -> None:
        """Load the adapters of `user_config: {adapters: ...}` ahead of their first request. Errors are logged.

        Args:
            rank: see `Gateway.reconfigure`.

        Raises:
            ValueError: it is faulty, and no replica of the application has had a good one.
        """
        await asyncio.to_thread(
            self._user_config.change, partial(read_user_config, AdapterList, user_config, "Replica")
        )
        preloaded, self._preloaded = self._preloaded, self._user_config.content.adapters
        for name, path in self._preloaded.items():
            if preloaded.get(name) != path:
                self._spawn(self._preload(name, str(path.absolute())))

    async def _preload(self, name: str, source: str) -> None:
        try:
            _, info = await self._calls.use(AdapterLocation(name, source), self._load_adapter)
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
            refused_settings=self._settings.refused(),
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for `ranklet.cluster.autoscaling`."""
        stats = {BUSY: self._state.busy(), WAIT_S: self._state.wait_s()}
        first_token_s = self._state.first_token_s()
        if first_token_s is not None:
            stats[FIRST_TOKEN_S] = first_token_s
        with contextlib.suppress(RankletError, TimeoutError):  # the engine has ended or hangs
            cache = (await self._on_thread(self._engine.snapshot)).kv_cache
            if cache is not None and cache.pages:
                stats[KV_USED] = cache.used_pages / cache.pages
        return stats

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve, which passes the result to routers. A replacement of this replica gets the same rank."""
        return {RANK: self._rank}

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica after three failures in a row."""
        escape_log()
        self._settings.look()
        if not self._is_publishing:  # Serve calls this once the replica has started
            self._is_publishing = True
            self._spawn(self._publisher.run())
            self._spawn(self._lost_gateways.run())
            self._spawn(self.pin(self._pins))
        problem = self._engine.problem()
        if problem is not None:
            raise RuntimeError(f"{problem}; replacing this replica")

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


def _pins(args: AppArgs) -> dict[str, str]:
    """Return the pinned adapters. A replica serves without pins where their file is faulty; gateways show that."""
    try:
        allowed = AllowedSources(args.adapter_roots, args.sources.allowed)
        return Registry(args.adapters_dir, args.adapters, args.base_names, allowed=allowed).pins()
    except RankletError as error:
        logger.error("pinned adapters: %s", error.message)
        return {}
