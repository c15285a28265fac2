"""Prefixes of prompts: their hashes, and which replicas have them in their key-value caches.

A page is `PAGE_TOKENS` tokens. Its hash covers all tokens up to its end and the root. The hashes only find replicas, so
that a collision costs time and nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.rendezvous import mix

PAGE_TOKENS = 64  # as in the engines' caches
MAX_PAGES = 512  # of a prompt
_MAX_ENTRIES = 200_000  # about 100 MB
_FEW = 8  # replicas of an entry that are looked at one by one
_MANY = 1024  # replicas of an entry at most; the ones used least recently are dropped
_MULTIPLIERS = mix(np.arange(PAGE_TOKENS, dtype=np.uint64)) | np.uint64(1)
_STEPS = np.arange(MAX_PAGES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def prefix_root(adapter: str | None, revision: str | None, salt: str) -> int:
    """Return the root of the hashes of prompts that may share pages.

    Args:
        adapter: name of the adapter; None for the base model.
        revision: of the adapter; None if it is not known.
        salt: prompts with different salts share nothing.
    """
    content = repr((adapter, revision, salt)).encode("utf-8", "backslashreplace")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def page_hashes(root: int, ids: NDArray[np.int32], base: int = 0, adapted_from: int = 0) -> list[int]:
    """Return the hashes of the full pages of a prompt, of the first `MAX_PAGES` at most.

    Args:
        base: root of the pages that have only tokens before the first one that the adapter changes.
        adapted_from: number of these tokens.
    """
    pages = min(len(ids) // PAGE_TOKENS, MAX_PAGES)
    content = ids[: pages * PAGE_TOKENS].reshape(pages, PAGE_TOKENS).astype(np.uint64) @ _MULTIPLIERS
    content ^= np.uint64(root)
    content[: adapted_from // PAGE_TOKENS] ^= np.uint64(root) ^ np.uint64(base)
    chained = np.cumsum(mix(content + _STEPS[:pages]), dtype=np.uint64)
    hashes: list[int] = mix(chained).tolist()
    return hashes


class CachedPrefix(NamedTuple):
    """Where a prompt's pages are cached.

    Attributes:
        tokens: float64 [replicas], number of the prompt's leading tokens that are cached at each replica.
        longest: indices of the one or two replicas that have more of them than all others; empty if there are more.
        pages: number of leading pages that these replicas have.
    """

    tokens: NDArray[np.float64]
    longest: Sequence[int]
    pages: int


class PrefixTable:
    """The pages that replicas have told of, and those that this router's own requests make. Callers pass the time.

    A replica that has a page has the pages before it. An entry counts while it was used later than the pages that the
    replica evicted last.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[int, dict[int, float]] = OrderedDict()  # by hash: replicas, and the last use
        self._numbers: dict[str, int] = {}  # of all replicas so far, so that entries outlive changes of the membership
        self._members: list[int] = []  # numbers by index
        # By number: index, -1 if the replica is gone; and since when it keeps pages. As lists for few, arrays for many.
        self._places: list[int] = []
        self._kept_since: list[float] = []
        self._place_array = np.zeros(0, np.intp)
        self._kept_array = np.zeros(0)

    def __len__(self) -> int:
        return len(self._entries)

    def set_members(self, replicas: Iterable[str]) -> None:
        for number in self._members:
            self._places[number] = -1
        self._members = [self._number(replica) for replica in replicas]
        for index, number in enumerate(self._members):
            self._places[number] = index
        self._place_array, self._kept_array = np.array(self._places, np.intp), np.array(self._kept_since)

    def _number(self, replica: str) -> int:
        number = self._numbers.setdefault(replica, len(self._numbers))
        if number == len(self._places):
            self._places.append(-1)
            self._kept_since.append(-inf)
        return number

    def learn(self, replica: str, pages: Iterable[int], kept_since_s: float, now_s: float) -> None:
        """Store what a replica has told: pages that it used at `now_s`, and since when it keeps pages."""
        number = self._numbers.get(replica)
        if number is None or self._places[number] < 0:
            return
        self._kept_since[number] = self._kept_array[number] = max(self._kept_since[number], kept_since_s)
        for page in pages:
            self._use(page, number, now_s)

    def add(self, pages: Sequence[int], index: int, now_s: float) -> None:
        """Note that the replica of this index is sent a prompt, and thus soon has its pages."""
        if not pages:
            return
        number, entries = self._members[index], self._entries
        for page in pages[:-1]:
            if page in entries:
                entries[page][number] = now_s
        self._use(pages[-1], number, now_s)

    def _use(self, page: int, number: int, now_s: float) -> None:
        entry = self._entries.get(page)
        if entry is None:
            self._entries[page] = {number: now_s}
            if len(self._entries) > _MAX_ENTRIES:
                self._entries.popitem(last=False)
            return
        entry[number] = now_s
        self._entries.move_to_end(page)
        if len(entry) > _MANY:
            del entry[min(entry, key=entry.__getitem__)]

    def drop(self, pages: Sequence[int], index: int, cached_tokens: int) -> None:
        """Note that the replica of this index had no more than this of a prompt."""
        number = self._members[index]
        for page in pages[cached_tokens // PAGE_TOKENS :]:
            if page in self._entries:
                self._entries[page].pop(number, None)

    def match(self, pages: Sequence[int]) -> CachedPrefix | None:
        """Look up a prompt. Returns None if no replica is known to have its first page."""
        tokens: NDArray[np.float64] | None = None
        longest: Sequence[int] = ()
        deepest = 0
        places, kept_since = self._places, self._kept_since
        entries = self._entries
        for depth, page in enumerate(pages, 1):
            if page not in entries:
                continue
            entry = entries[page]
            if len(entry) <= _FEW:
                few = [places[n] for n, used_s in entry.items() if used_s >= kept_since[n] and places[n] >= 0]
                if not few:
                    continue
                if tokens is None:
                    tokens = np.zeros(len(self._members))
                for i in few:  # faster than an array of indices
                    tokens[i] = depth * PAGE_TOKENS
                longest = few if len(few) <= 2 else ()
            else:
                numbers = np.fromiter(entry, np.intp, len(entry))
                used = np.fromiter(entry.values(), np.float64, len(entry))
                where = self._place_array[numbers]
                many = where[(used >= self._kept_array[numbers]) & (where >= 0)]
                if not len(many):
                    continue
                if tokens is None:
                    tokens = np.zeros(len(self._members))
                tokens[many] = depth * PAGE_TOKENS
                longest = many.tolist() if len(many) <= 2 else ()
            deepest = depth
        return None if tokens is None else CachedPrefix(tokens, longest, deepest)
