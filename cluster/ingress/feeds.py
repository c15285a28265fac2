"""Receives the pieces of texts: one stream from each replica, whose messages contain the pieces of many texts."""

import asyncio
import contextlib
import contextvars
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.ingress.text_call import TextCall
from ranklet.cluster.message import Begun, InferenceCall
from ranklet.replicas.engine.params import GenerateParams
from ranklet.routing.affinity import Affinity
from ranklet.routing.hint import HINT, RoutingHint

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # before a broken feed is opened again
_FEED_ERRORS = (RayError, RayServeException, grpc.RpcError)

logger = logging.getLogger("ray.serve")


class TextFeeds:
    """The feeds of one gateway: one from each live replica, from the first text call on.

    Args:
        handle: of the replicas.
        gateway: id of this gateway.
        hint_ids: unique in this process.
        on_begun: called with the number of each attempt that a replica works on.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", affinity: Affinity, gateway: str, hint_ids: Iterator[int],
        on_begun: Callable[[int], object],
    ) -> None:  # fmt: skip
        self._handle = handle
        self._affinity = affinity
        self._gateway = gateway
        self._hint_ids = hint_ids
        self._on_begun = on_begun
        self._calls: dict[int, TextCall] = {}
        self._waiting: set[int] = set()  # numbers of attempts without a token
        self._is_wanted = self._has_stopped = False
        self._members: object = None
        self._feeds: dict[str, asyncio.Task[None]] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self.opened = 0  # number of opened feeds
        self.gaps = 0  # pieces that came behind a gap, and were replaced by the whole answer

    @property
    def replicas(self) -> set[str]:
        """Replicas whose feed is open, or is being opened again."""
        return set(self._feeds)

    @contextlib.contextmanager
    def attempt(self, call: TextCall) -> Iterator[InferenceCall[GenerateParams]]:
        """Pass the pieces of an attempt at a call to `call`. Yields the call to send."""
        self._is_wanted = True
        self.update()
        number = next(self._hint_ids)  # of its hint too
        self._calls[number] = call
        self._waiting.add(number)
        try:
            yield call.begin_attempt(number)
        finally:
            del self._calls[number]
            self._waiting.discard(number)
            call.replica = None
            self.gaps += call.gaps
            call.gaps = 0

    def update(self) -> None:
        """Open a feed from each live replica. Close those from others, once no call needs them.

        Called at each text call and each report of a replica.
        """
        members = self._affinity.members()
        if not self._is_wanted or self._has_stopped or members is self._members:
            return
        live = {each.id for each in members}
        for replica in live - self._feeds.keys():
            # In an empty context, Ray gives the feed a request id of its own. See `ReplicasClient`.
            reading = self._read(replica)
            self._feeds[replica] = asyncio.get_running_loop().create_task(reading, context=contextvars.Context())
        used = {call.replica for call in self._calls.values()}
        for replica in self._feeds.keys() - live - used:
            self._feeds.pop(replica).cancel()
        if self._feeds.keys() == live:  # else look again, since a replica that ends may still generate texts
            self._members = members

    def stop(self) -> None:
        """Close all feeds, and open no others. Call it in their event loop."""
        self._has_stopped = True
        for task in (*self._feeds.values(), *self._finishing):
            task.cancel()

    async def _read(self, replica: str) -> None:
        """Read the feed of a replica, and open it again when it breaks, for as long as the replica lives."""
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                try:
                    if await self._read_once(replica):
                        pause_s = _FIRST_PAUSE_S
                except _FEED_ERRORS as error:
                    logger.info("the feed of replica %s broke: %s", replica, type(error).__name__)
                except Exception:
                    logger.exception("the feed of replica %s broke", replica)
                if all(replica != each.id for each in self._affinity.members()):
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            if self._feeds.get(replica) is asyncio.current_task():
                del self._feeds[replica]
                self._members = None

    async def _read_once(self, replica: str) -> bool:
        """Read a feed to its end. Returns whether it was open."""
        hint = RoutingHint(next(self._hint_ids), only=replica)
        feed = self._handle.options(method_name="feed", stream=True)
        opening: Any = feed.remote(self._gateway, replica, **{HINT: hint})
        is_open = False
        try:
            async for messages in opening:
                self.opened += not is_open
                is_open = True
                finished: list[tuple[int, int]] = []
                for message in messages:
                    self._on_message(pickle.loads(message), finished)
                if finished:
                    self._finish(replica, finished)
        finally:
            opening.cancel()
        return is_open

    def _on_message(self, message: Any, finished: list[tuple[int, int]]) -> None:
        calls = self._calls
        if isinstance(message, Begun):
            try:
                if message.number in calls:
                    self._on_begun(message.number)
                    calls[message.number].begin(message)
            except Exception:
                logger.exception("the receiver of a text failed")
            return
        for number, index, start, tokens, logprobs in message:
            call = calls.get(number)
            if number in self._waiting:
                self._waiting.discard(number)
                self._affinity.begin(number)
            try:
                if call is not None and not call.on_piece(index, start, tokens, logprobs):
                    finished.append((number, index))
            except Exception:  # a defect of one request must not end the feed of all
                logger.exception("the receiver of a text failed")

    def _finish(self, replica: str, texts: list[tuple[int, int]]) -> None:
        task = asyncio.get_running_loop().create_task(self._send_finish(replica, texts), context=contextvars.Context())
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _send_finish(self, replica: str, texts: list[tuple[int, int]]) -> None:
        hint = RoutingHint(next(self._hint_ids), only=replica)
        try:
            await self._handle.options(method_name="finish").remote(self._gateway, texts, **{HINT: hint})
        except _FEED_ERRORS as error:  # the texts end at their length limit, or their call fails too
            logger.info("texts of replica %s were not ended early: %s", replica, type(error).__name__)
