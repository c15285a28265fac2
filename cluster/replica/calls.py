"""The life of an inference call on a replica: its adapter is resolved, the engine computes it, the replica replies."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.resolver import AdapterResolver, ResolvedAdapter
from ranklet.cluster.logs import log_place
from ranklet.cluster.message import (
    Begun,
    Continuation,
    InferenceCall,
    InferenceReply,
    OtherPrompts,
    Refusal,
    no_classifier,
)
from ranklet.cluster.replica.feeds import OutgoingFeeds
from ranklet.cluster.replica.state import ReplicaState
from ranklet.cluster.replica.text_progress import CallSink, TextProgress
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.params import EmbedParams, GenerateParams
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.errors import (
    AdapterChanged,
    AdapterNotFound,
    InternalError,
    RankletError,
    Unavailable,
    UnknownModel,
)
from ranklet.replicas.process.messages import FeedKey
from ranklet.replicas.process.process import EngineProcess, RemoteTicket
from ranklet.routing.report import QueueLoad

_ATTEMPTS = 3  # to use an adapter whose files change

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
Result = TypeVar("Result")


class ReplicaCalls:
    """Answers the calls of one replica.

    Args:
        replica: id of the replica.
        settings: of embeddings of adapters.
    """

    def __init__(
        self, replica: str, engine: EngineProcess, resolver: AdapterResolver, state: ReplicaState, feeds: OutgoingFeeds,
        settings: AdapterSettings,
    ) -> None:  # fmt: skip
        self._id = replica
        self._engine = engine
        self._resolver = resolver
        self._state = state
        self._feeds = feeds
        self._settings = settings
        self._tickets: dict[FeedKey, RemoteTicket] = {}  # of open text calls

    async def answer(
        self, call: InferenceCall[Any], make_result: Callable[[Any], Result]
    ) -> InferenceReply[Result] | Refusal:
        """Compute a call. Cancellation drops what the device has not computed.

        Args:
            make_result: makes the reply's result of the engine's.
        """
        outcome: Answer | RankletError
        resolved: ResolvedAdapter | None = None
        has_begun = False
        progress = TextProgress(call, self._state) if isinstance(call.params, GenerateParams) else None
        self._state.call_arrived(call.sender, call.work, call.texts)
        try:
            self._check_engine(call.continuation)
            has_begun = True
            if call.adapter is None:
                outcome = await self._compute(call, None, progress)
            else:
                resolved, outcome = await self._compute_with_adapter(call, call.adapter, progress)
            if progress is not None:
                progress.complete(outcome.result)
        except RankletError as error:
            outcome = error
        except Exception as error:
            logger.exception("a call failed")
            outcome = InternalError(
                f"the replica failed: {type(error).__name__}: {error}. Its log has more: {log_place()}"
            )
        finally:
            if progress is None:
                self._state.call_finished(call.work)
            else:
                progress.end()
        load = self._state.load_for(call.sender)
        if isinstance(outcome, RankletError):
            return Refusal.of(outcome, self._id, call.adapter_name or "", load, has_begun=has_begun)
        if outcome.first_piece_s is not None:
            self._state.first_token_came(outcome.first_piece_s)
        return self._reply(outcome, make_result(outcome.result), resolved, load)

    def finish(self, gateway: str, number: int, index: int) -> None:
        """End a text of an open call with what it has."""
        ticket = self._tickets.get(FeedKey(gateway, number))
        if ticket is not None:
            ticket.finish(index)

    async def use(
        self, location: AdapterLocation, use: Callable[[ResolvedAdapter], Awaitable[T]]
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
        self, location: AdapterLocation, use: Callable[[ResolvedAdapter], Awaitable[T]]
    ) -> tuple[ResolvedAdapter, T]:
        resolved = await self._resolver.resolve(location.name, location.source)
        location.check_revision(resolved.adapter.revision)
        return resolved, await use(resolved)

    def _check_engine(self, continuation: Continuation | None) -> None:
        problem = self._engine.problem()
        if problem is not None:
            raise Unavailable(f"{problem}; this replica is being replaced. Send the request again")
        if continuation is not None and continuation.base_revision not in ("", self._engine.limits.base_revision):
            raise Unavailable(
                "the text was begun by another base model than this replica serves. Send the request again"
            )

    async def _compute_with_adapter(
        self, call: InferenceCall[Any], location: AdapterLocation, progress: TextProgress | None
    ) -> tuple[ResolvedAdapter, Answer]:
        try:
            return await self.use(location, partial(self._compute, call, progress=progress))
        except (UnknownModel, AdapterNotFound):
            held = None if call.continuation is None else await self._held_revision(location)
            if held is None:
                raise
            return held, await self._compute(call, held, progress)

    async def _held_revision(self, location: AdapterLocation) -> ResolvedAdapter | None:
        """Return the requested revision if the engine still has it in a slot, although its files are gone."""
        with contextlib.suppress(RankletError, TimeoutError):
            for each in await asyncio.to_thread(self._engine.report):
                found = (each.name, each.revision, each.where) == (location.name, location.requested_revision, "gpu")
                if found and each.info is not None:
                    invocation = each.info.invocation
                    return ResolvedAdapter(
                        AdapterRef(each.name, location.source, each.revision, each.marks, invocation)
                    )
        return None

    async def _compute(
        self, call: InferenceCall[Any], resolved: ResolvedAdapter | None, progress: TextProgress | None
    ) -> Answer:
        loop, prompts, params = asyncio.get_running_loop(), call.prompts(), call.params
        if resolved is not None and isinstance(params, EmbedParams):
            params = await self._as_the_folder_says(params, resolved.adapter)
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

        feed = FeedKey(call.sender, call.number) if isinstance(call.params, GenerateParams) else None
        if feed is not None:
            self._feeds.begin(call.sender, self._begun(call.number, resolved))
        adapter = None if resolved is None else resolved.adapter
        given = call.continuation.texts() if call.continuation else ()

        def begun(index: int, cached_tokens: int) -> None:
            if progress is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(progress.begin, index, cached_tokens)

        ticket = self._engine.submit(
            prompts, adapter, params, CallSink(done, begun), feed, given=given, key_name=call.key_name
        )
        if feed is not None:
            self._tickets[feed] = ticket
        try:
            return await answer
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        finally:
            if feed is not None:
                del self._tickets[feed]

    async def _as_the_folder_says(self, params: EmbedParams, adapter: AdapterRef) -> EmbedParams:
        settings = self._settings.known(adapter)
        if settings is None:
            settings = await asyncio.to_thread(self._settings.read, adapter)
        if params.head is not None:
            if params.head.revision != adapter.revision:
                raise OtherPrompts(f"adapter {adapter.name!r} was replaced. Send the request again", param="model")
            assert params.head.tokens is not None or settings.classifier is not None, "gateways read the same folder"
            return params
        if settings.classifier is not None:
            raise no_classifier(adapter.name)
        dense = self._settings.base.dense if params.dense is None else params.dense
        if settings.prompting(params.prompting.name) != params.prompting or settings.dense != dense:
            raise OtherPrompts(f"adapter {adapter.name!r} has other prompts. Send the request again", param="model")
        if settings is self._settings.base:
            return params
        normalize = settings.normalize if params.normalize is None else params.normalize
        return replace(params, pooling=settings.mode, normalize=normalize, dense=settings.dense)

    def _begun(self, number: int, resolved: ResolvedAdapter | None) -> Begun:
        base_revision = self._engine.limits.base_revision
        if resolved is None:
            return Begun(number, self._id, None, None, base_revision)
        held, name = self._engine.held(), resolved.adapter.name
        tier = "gpu" if name in held.resident else "host" if name in held.hosted else "disk"
        return Begun(number, self._id, resolved.adapter.revision, _tier(tier, resolved), base_revision)

    def _reply(
        self, answer: Answer, result: Result, resolved: ResolvedAdapter | None, load: QueueLoad
    ) -> InferenceReply[Result]:
        return InferenceReply(
            result=result,
            prompt_tokens=answer.prompt_tokens,
            tier=_tier(answer.tier, resolved),
            backend=answer.backend,
            replica=self._id,
            revision=resolved.adapter.revision if resolved else None,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            load=load,
            first_piece_s=answer.first_piece_s,
        )


def _tier(tier: str | None, resolved: ResolvedAdapter | None) -> str | None:
    return "remote" if resolved and resolved.downloaded and tier == "disk" else tier
