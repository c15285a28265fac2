"""Calls from a gateway to the replicas. Splits requests into calls."""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.broadcast import CONTROL_TIMEOUT_S, broadcast
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.call_sender import CallSender, RepeatableCall, RepeatableError, summary
from ranklet.cluster.ingress.feeds import TextFeeds
from ranklet.cluster.ingress.suspects import Suspects
from ranklet.cluster.ingress.text_call import TextCall, TextReceiver
from ranklet.cluster.ingress.watchdog import Watchdog
from ranklet.cluster.message import AdapterText, InferenceCall, InferenceReply, Refusal, ReplicaDescription, pack, split
from ranklet.cluster.text_result import GenerateResult, prompt_result_bytes
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterReport
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import SEED_BITS, GenerateParams
from ranklet.replicas.errors import AdapterLoadCrashed, Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT, RoutingHint

_MAX_TEXT_PROMPTS = 32  # of a call: each may need many steps
_LOOKS = 8  # at a text request's signs of life, during its timeout
_CONTROL_ERRORS = (RayError, RayServeException, grpc.RpcError, TimeoutError)


class ReplicasClient:
    """Client of the application's replicas.

    Args:
        on_repeat: called for each repeated call, with whether it continues texts.
        sender: id of this gateway.
        on_crash: called with the name and source of an adapter that was loading when an engine died.

    Attributes:
        suspects: adapters that are not tried now.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", affinity: Affinity, limits: LimitsConfig,
        on_repeat: Callable[[bool], None], sender: str, on_crash: Callable[[str, str], Awaitable[object]] | None = None,
    ) -> None:  # fmt: skip
        self.suspects = Suspects()
        self._on_crash = on_crash
        self._handle = handle
        self._affinity = affinity
        self._timeout_s = limits.request_timeout_s
        self._sender = sender
        self._hint_ids = itertools.count(1)  # 0 is no number of a text call
        self._limits: RequestLimits | None = None
        self.watchdog = Watchdog(affinity, self._prefetch, limits.no_replica_timeout_s)
        self.feeds = TextFeeds(handle, affinity, sender, self._hint_ids, self.watchdog.begin)
        self._calls = CallSender(
            handle, affinity, self.watchdog, self._hint_ids, limits.no_replica_timeout_s, on_repeat
        )

    async def infer(
        self, method: str, adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], params: Any,
        result_bytes: int, *, key_name: str = "",
    ) -> list[InferenceReply[Any]]:  # fmt: skip
        """Call `method` of the replicas. A large request is split into several calls.

        Args:
            prompts: int32 [length] each.
            params: parameters of the task, such as `EmbedParams`.
            result_bytes: size of the result of one prompt.
            key_name: name of the API key; "" without one.

        Returns:
            The replies to the calls, in the order of the prompts.

        Raises:
            Unavailable: no replica answered in time, or two replicas failed.
            RankletError: a replica returned this error.
        """
        parts = split(prompts, result_bytes)
        calls = [RepeatableCall(pack(adapter, part, params, self._sender, key_name)) for part in parts]
        async with self._suspecting(adapter):
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._calls.send_all(method, calls)
            except TimeoutError:
                raise self._timed_out("an answer") from None

    async def generate(
        self, adapter: AdapterLocation | None, prompts: Sequence[NDArray[np.int32]], params: GenerateParams,
        receiver: TextReceiver, *, key_name: str = "",
    ) -> list[InferenceReply[GenerateResult]]:  # fmt: skip
        """Generate `params.n` texts for each prompt. `receiver` gets all tokens, before the end of this call.

        If a replica fails, another one continues its texts. The timeout starts again with each message about a text of
        the request.

        Args:
            prompts: int32 [length] each.
            key_name: name of the API key; "" without one.

        Returns:
            The replies to the calls, in the order of the prompts.

        Raises:
            InvalidRequest: the result of a prompt may be too large for a message.
            Unavailable: no replica answered in time, or several failed.
            UnknownModel: the adapter has another revision now, also after `receiver` got tokens.
            RankletError: a replica returned this error.
        """
        result_bytes = prompt_result_bytes(params, max(map(len, prompts)))
        calls: list[_TextAttempts] = []
        texts = 0
        for part in split(prompts, result_bytes, _MAX_TEXT_PROMPTS):
            count = len(part) * params.n
            call = pack(adapter, part, _with_seed(params), self._sender, key_name)
            calls.append(_TextAttempts(self.feeds, TextCall(call, count, texts, receiver)))
            texts += count
        async with self._suspecting(adapter):
            try:
                async with self._timeout_between_signs(calls):
                    replies = await self._calls.send_all("generate", calls)
            except TimeoutError:
                raise self._timed_out("a token") from None
        for each, reply in zip(calls, replies, strict=True):
            each.text.complete(reply)
        return replies

    @contextlib.asynccontextmanager
    async def _suspecting(self, adapter: AdapterLocation | None) -> AsyncIterator[None]:
        """Refuse an adapter that is a suspect. It becomes one, for all gateways, if an engine dies in the body."""
        self.suspects.check(adapter)
        try:
            yield
        except AdapterLoadCrashed:
            if adapter is not None:
                self.suspects.add(adapter.name, adapter.source)
                if self._on_crash is not None:
                    await self._on_crash(adapter.name, adapter.source)
            raise

    @contextlib.asynccontextmanager
    async def _timeout_between_signs(self, calls: "Sequence[_TextAttempts]") -> AsyncIterator[None]:
        """Raise TimeoutError in the body when no message about the calls has come for the time of a request."""
        loop, interval_s = asyncio.get_running_loop(), self._timeout_s / _LOOKS
        async with asyncio.timeout(self._timeout_s) as timeout:
            looking = loop.call_later(interval_s, lambda: look(0))

            def look(before: int) -> None:
                nonlocal looking
                signs = sum(each.text.signs for each in calls)
                if signs != before and not timeout.expired():
                    timeout.reschedule(loop.time() + self._timeout_s)
                looking = loop.call_later(interval_s, look, signs)

            try:
                yield
            finally:
                looking.cancel()

    def _timed_out(self, expected: str) -> Unavailable:
        return Unavailable(
            f"expected {expected} within {self._timeout_s:g} s (limits.request_timeout_s), got none. The cluster is "
            "overloaded, or its replicas are starting. Try again"
        )

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
        loaded: AdapterInfo = await self._control_adapter("load", adapter, tuple(pins))
        self.suspects.clear(adapter.name)
        return loaded

    async def text_description(self, adapter: AdapterLocation) -> AdapterText:
        """Describe what an adapter's current revision says about prompts and texts.

        The replica that the router chooses downloads the adapter if it must, and keeps the answer for this revision.

        Raises:
            Unavailable: no replica answers.
            RankletError: the adapter cannot be found.
        """
        text: AdapterText = await self._control_adapter("text_description", adapter)
        return text

    async def _control_adapter(self, method: str, adapter: AdapterLocation, *arguments: Any) -> Any:
        hint = {HINT: RoutingHint(next(self._hint_ids), adapter.name)}
        given = adapter.name, adapter.source, *arguments
        result = await self._control(method, *given, timeout_s=self._timeout_s, **hint)
        if isinstance(result, Refusal):
            raise result.error()
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
            raise Unavailable(f"expected an answer from a replica, got {summary(error)}") from error

    async def _prefetch(self, adapter: AdapterLocation, replica: str) -> None:
        hint = {HINT: RoutingHint(next(self._hint_ids), only=replica)}
        # Requests load the adapter themselves if the prefetch fails.
        with contextlib.suppress(Unavailable, AdapterLoadCrashed):
            self.suspects.check(adapter)
            await self._control("prefetch", adapter.name, adapter.source, timeout_s=CONTROL_TIMEOUT_S, **hint)


@dataclass(frozen=True)
class _TextAttempts:
    """A text call and its attempts, whose pieces come by the feeds."""

    feeds: TextFeeds
    text: TextCall

    @property
    def continues(self) -> bool:
        return self.text.continues

    def attempt(self) -> AbstractContextManager[InferenceCall[GenerateParams]]:
        return self.feeds.attempt(self.text)

    def pause_before_repeat(self, failure: RepeatableError) -> float:
        return self.text.pause_before_repeat(failure)


def _with_seed(params: GenerateParams) -> GenerateParams:
    """Return parameters with a seed, with which another replica can continue the texts."""
    is_given = params.seed is not None and params.seed >= 0
    return params if is_given else replace(params, seed=secrets.randbits(SEED_BITS))
