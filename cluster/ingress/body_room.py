"""Bounds the bytes of large bodies that one gateway holds, from the first one read until the request is tokenised."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from ranklet.replicas.engine.fair_share import fair_share
from ranklet.replicas.errors import Saturated


class BodyRoom:
    """The bytes that a gateway has for large bodies. Each owner may use its fair share of them.

    Args:
        limit: limits.max_held_body_bytes.
        small: bodies up to this size are not counted, so that large ones never keep them out.
    """

    def __init__(self, limit: int, small: int) -> None:
        self.limit = limit
        self.small = small
        self.held: Counter[str] = Counter()  # by owner

    @contextlib.contextmanager
    def share(self, owner: str) -> Iterator["BodyShare"]:
        """Return the share of one body, which is free again at the end of the context."""
        share = BodyShare(self, owner)
        try:
            yield share
        finally:
            share.release()


class BodyShare:
    """The bytes of one body in the room."""

    def __init__(self, room: BodyRoom, owner: str) -> None:
        self._room = room
        self._owner = owner
        self._held = 0

    def grow(self, size_bytes: int) -> None:
        """Count the body, which now has `size_bytes`.

        Raises:
            Saturated: its owner has no room for it.
        """
        room, more = self._room, size_bytes - self._held
        if size_bytes <= room.small or more <= 0:
            return
        own = room.held[self._owner]
        most = fair_share(room.limit, room.held.total() - own)
        if own + more > most:
            raise Saturated(
                f"body: expected at most {most} bytes in large requests that this gateway holds for one key or client "
                f"(limits.max_held_body_bytes: {room.limit}), got {own + more}. Try again, or send fewer at once"
            )
        room.held[self._owner] += more
        self._held = size_bytes

    def release(self) -> None:
        """Free the room, once the body is no longer held."""
        self._room.held[self._owner] -= self._held
        self._held = 0
        if not self._room.held[self._owner]:
            del self._room.held[self._owner]
