"""Assigns pages of the key-value cache: references, content hashes and LRU eviction. No tensors, no locks.

A page is free, used or cached. A used page has references. `register` names the content of a full page by a hash (see
`prefix.py`); from then on other sequences can share the page, and it stays cached after its last reference is
released. A page without a hash belongs to the one sequence that allocated it, so a page that is being written is never
shared. If no page is free, the cached page that lost its last reference first is evicted.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from math import inf
from time import monotonic
from typing import NamedTuple

PAGE_TOKENS = 64  # equal to the constant of kernels/paged_spans.py, which imports torch


def pages_of(tokens: int) -> int:
    """Return the number of pages that hold this many tokens."""
    return -(-tokens // PAGE_TOKENS)


class OutOfPages(Exception):  # noqa: N818 - named after its cause, as in replicas/errors.py
    """Fewer pages are free or cached than a sequence needs."""


class IntegrityError(Exception):
    """The pool's tables contradict each other: a defect of ranklet."""


class PrefixMatch(NamedTuple):
    """The longest prefix of a sequence that is in the pool.

    Attributes:
        pages: number of pages.
        cached: number of these pages that no sequence uses. Sharing them makes fewer pages available.
    """

    pages: int
    cached: int


class PagePool:
    """The pages of one device.

    Args:
        clock: seconds, from which the age of cached pages follows.

    Attributes:
        count: number of pages.
        evicted_pages: cached pages that were evicted until now.
        asked_tokens: tokens of all pages that `share` looked up.
        shared_tokens: tokens of all pages that `share` found.
    """

    def __init__(self, pages: int, clock: Callable[[], float] = monotonic) -> None:
        self.count = pages
        self.evicted_pages = self.asked_tokens = self.shared_tokens = 0
        self._references = [0] * pages
        self._hashes: list[bytes | None] = [None] * pages
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(pages - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, float] = OrderedDict()  # when it was released; the next page to evict first
        self._clock = clock
        self._kept_since_s = -inf

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Number of pages that `allocate` can return."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.count - self.available

    @property
    def kept_s(self) -> float:
        """Pages that were used within this time are still there; infinite if none was evicted."""
        return self._clock() - self._kept_since_s

    def allocate(self, count: int) -> list[int]:
        """Return pages with one reference each: free ones first, then evicted ones.

        Raises:
            OutOfPages: fewer pages are available. Nothing has changed.
        """
        missing = count - len(self._free)
        if missing > len(self._cached):
            raise OutOfPages(f"expected {count} free or cached pages, got {self.available} of {self.count}")
        for _ in range(missing):
            page, self._kept_since_s = self._cached.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        self.evicted_pages += max(missing, 0)
        start = len(self._free) - count
        pages = self._free[start:]
        pages.reverse()
        del self._free[start:]
        for page in pages:
            self._references[page] = 1
        return pages

    def match(self, hashes: Iterable[bytes]) -> PrefixMatch:
        """Return what `share` would find. Changes nothing, so that a planner can ask in every step."""
        pages = cached = 0
        for each in hashes:
            page = self._by_hash.get(each)
            if page is None:
                break
            pages += 1
            cached += not self._references[page]
        return PrefixMatch(pages, cached)

    def share(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest known prefix, and add a reference to each.

        Args:
            hashes: the pages that the sequence may share, from its first token on.
        """
        pages = []
        for each in hashes:
            page = self._by_hash.get(each)
            if page is None:
                break
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1
            pages.append(page)
        self.asked_tokens += len(hashes) * PAGE_TOKENS
        self.shared_tokens += len(pages) * PAGE_TOKENS
        return pages

    def unshared(self, pages: Iterable[int]) -> int:
        """Return how many of a sequence's pages no other sequence uses: a release makes that many pages available."""
        return sum(self._references[page] == 1 for page in pages)

    def register(self, page: int, content: bytes) -> bool:
        """Let other sequences share a full page.

        Args:
            content: hash of the page's content and of all pages before it.

        Returns:
            False if another page has this content; then this page stays private.

        Raises:
            ValueError: the page has no reference, or has a hash already.
        """
        if not self._references[page]:
            raise ValueError(f"page {page}: register of a page that no sequence uses")
        if self._hashes[page] is not None:
            raise ValueError(f"page {page}: register of a page that has a hash already")
        if self._by_hash.setdefault(content, page) != page:
            return False
        self._hashes[page] = content
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page of a sequence, given in the sequence's order.

        The last pages are evicted before the first: without the pages before it, a page is useless to others.

        Raises:
            ValueError: a page has no reference.
        """
        now_s = self._clock()
        for page in reversed(pages):
            left = self._references[page] - 1
            if left < 0:
                raise ValueError(f"page {page}: release of a page that no sequence uses")
            self._references[page] = left
            if left:
                continue
            if self._hashes[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = now_s

    def forget(self, pages: Iterable[int]) -> None:
        """Drop the hashes of pages whose content is wrong, because the step that wrote them failed.

        No other sequence will share them. Sequences that share them already keep their references. The caller must
        also forget the pages that these sequences computed afterwards, since they are wrong too.
        """
        for page in pages:
            if self._hashes[page] is None:
                continue
            self._forget(page)
            if not self._references[page]:
                del self._cached[page]
                self._free.append(page)

    def forget_all(self) -> None:
        """Drop every hash, so that pages written until now are not shared with further sequences."""
        self.forget(list(self._by_hash.values()))
        self._kept_since_s = self._clock()

    def _forget(self, page: int) -> None:
        content, self._hashes[page] = self._hashes[page], None
        assert content is not None
        del self._by_hash[content]

    def copy(self) -> "PagePool":
        """Return a pool with the same pages, to check while this one changes."""
        twin = PagePool(0)
        twin.count, twin.evicted_pages = self.count, self.evicted_pages
        twin.asked_tokens, twin.shared_tokens = self.asked_tokens, self.shared_tokens
        twin._references, twin._hashes = self._references.copy(), self._hashes.copy()
        twin._by_hash, twin._free = self._by_hash.copy(), self._free.copy()
        twin._cached = self._cached.copy()
        return twin

    def check_integrity(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Check that the tables agree. Takes time in proportion to the number of pages.

        Args:
            held: the pages of every sequence. If given, the references must be exactly these.

        Raises:
            IntegrityError: they do not; the message names the first page or count that is wrong.
        """
        used = sum(1 for references in self._references if references > 0)
        if self.free + self.cached + used != self.count:
            raise IntegrityError(
                f"expected free + cached + used = {self.count} pages, got {self.free} + {self.cached} + {used}"
            )
        free = set(self._free)
        if len(free) != self.free:
            raise IntegrityError("a page is free twice")
        for page, (references, content) in enumerate(zip(self._references, self._hashes, strict=True)):
            if references < 0:
                raise IntegrityError(f"page {page}: {references} references")
            if (page in free) + (page in self._cached) + (references > 0) != 1:
                raise IntegrityError(
                    f"page {page}: expected one of free, cached and used, got free {page in free}, "
                    f"cached {page in self._cached}, {references} references"
                )
            if content is None and page in self._cached:
                raise IntegrityError(f"page {page}: cached without a hash")
            if content is not None and (page in free or self._by_hash.get(content) != page):
                raise IntegrityError(f"page {page}: its hash belongs to page {self._by_hash.get(content)}")
        hashed = sum(content is not None for content in self._hashes)
        if hashed != len(self._by_hash):
            raise IntegrityError(f"expected a page for each of {len(self._by_hash)} hashes, got {hashed}")
        if held is not None:
            self._check_references(Counter(page for pages in held for page in pages))

    def _check_references(self, expected: Counter[int]) -> None:
        for page, references in enumerate(self._references):
            if references != expected[page]:
                raise IntegrityError(f"page {page}: {references} references, but {expected[page]} sequences hold it")
