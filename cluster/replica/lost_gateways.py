"""Ends the text calls of gateways whose process has ended. Through Ray's own calls, no replica notices it otherwise."""

import asyncio
import logging
from collections.abc import Callable, Collection

from ray.util import list_named_actors

from ranklet.cluster.replica.feeds import OutgoingFeeds

_INTERVAL_S = 1.0

logger = logging.getLogger("ray.serve")


class LostGateways:
    """Looks for gateways that have open text calls, do not receive the replica's reports and no longer exist.

    A gateway that shuts down receives no reports either, but exists until its requests are answered.

    Args:
        find_ended: returns which of some gateways no longer exist. May block.
    """

    def __init__(self, feeds: OutgoingFeeds, find_ended: Callable[[Collection[str]], Collection[str]]) -> None:
        self._feeds = feeds
        self._find_ended = find_ended
        self._reached: Collection[str] = ()

    def on_reached(self, gateways: Collection[str]) -> None:
        """Receive which gateways the last report has reached."""
        self._reached = gateways

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            suspects = self._feeds.callers.difference(self._reached)
            if suspects:
                await self._check(suspects)

    async def _check(self, gateways: Collection[str]) -> None:
        try:
            ended = await asyncio.to_thread(self._find_ended, gateways)
        except Exception as error:  # Ray's GCS may be down
            logger.info("gateways were not looked up: %s", type(error).__name__)
            return
        for gateway in ended:
            self._feeds.lose(gateway)


def ended_actors(ids: Collection[str], existing: str) -> Collection[str]:
    """Return those of some ids of Serve's replicas whose actor does not exist.

    Args:
        existing: id of a replica that exists. If its actor is not found either, this function finds none.
    """
    names = [str(each["name"]) for each in list_named_actors(all_namespaces=True)]

    def exists(id: str) -> bool:
        return any(name.endswith(id) for name in names)

    return [id for id in ids if not exists(id)] if exists(existing) else []
