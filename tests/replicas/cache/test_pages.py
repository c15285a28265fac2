"""The page pool against a plain model: which page is free, used or cached, and what it contains."""

from dataclasses import dataclass
from math import inf

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ranklet.replicas.cache.pages import PAGE_TOKENS, IntegrityError, OutOfPages, PagePool, PrefixMatch
from ranklet.replicas.cache.prefix import PrefixRoot, page_hashes, sharable_pages

ROOTS = [PrefixRoot("base", revision, "", "float32") for revision in ("", "adapter")]
Content = tuple[PrefixRoot, tuple[int, ...]]  # one letter for each page up to this one


@dataclass(eq=False)
class Holder:
    """A sequence of full pages; all tokens of a page are the same letter."""

    root: PrefixRoot
    letters: list[int]
    pages: list[int]
    registered: int  # leading pages that were shared or registered
    own: int  # leading pages that were shared

    def contents(self) -> list[Content]:
        return [(self.root, tuple(self.letters[: index + 1])) for index in range(len(self.letters))]

    def hashes(self) -> list[bytes]:
        return page_hashes(self.root, np.repeat(np.array(self.letters, np.int32), PAGE_TOKENS))


class Pages(RuleBasedStateMachine):
    """Random sequences that begin, grow, register, end and fail."""

    holders = Bundle("holders")

    @initialize(count=st.integers(1, 9))
    def begin(self, count: int) -> None:
        self.count = count
        self.pool = PagePool(count)
        self.live: list[Holder] = []
        self.memory: dict[int, Content | None] = {}  # what was written; None for a failed step
        self.known: dict[Content, int] = {}
        self.cached: list[int] = []  # the next page to evict first
        self.evicted = 0

    def users(self, page: int) -> int:
        return sum(holder.pages.count(page) for holder in self.live)

    def take(self, count: int) -> list[int] | None:
        """Allocate pages, and check which ones the pool chose. Returns None if there are too few."""
        free = self.count - len(self.cached) - len({page for holder in self.live for page in holder.pages})
        assert (self.pool.free, self.pool.available) == (free, free + len(self.cached))
        if count > self.pool.available:
            with pytest.raises(OutOfPages, match=f"expected {count} free or cached pages, got {self.pool.available}"):
                self.pool.allocate(count)
            return None
        pages = self.pool.allocate(count)
        missing = max(count - free, 0)
        evicted, self.cached = self.cached[:missing], self.cached[missing:]
        self.evicted += missing
        assert len(set(pages)) == len(pages) == count
        assert set(evicted) <= set(pages), "the cached pages that were released first are evicted"
        self.known = {content: page for content, page in self.known.items() if page not in evicted}
        for page in pages:
            assert not self.users(page), "a page that is being written has one owner"
            assert page not in self.known.values()
            assert page not in self.cached
        return pages

    @rule(target=holders, root=st.sampled_from(ROOTS), letters=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, root: PrefixRoot, letters: list[int]) -> object:
        holder = Holder(root, letters, [], 0, 0)
        contents = holder.contents()
        sharable = sharable_pages(len(letters) * PAGE_TOKENS)
        assert sharable == len(letters) - 1, "the last token is computed, so the last page is written"
        expected: list[int] = []
        for content in contents[:sharable]:
            if content not in self.known:
                break
            expected.append(self.known[content])
        match = self.pool.match(holder.hashes()[:sharable])
        assert match == PrefixMatch(len(expected), sum(page in self.cached for page in expected))
        available = self.pool.available
        shared = self.pool.share(holder.hashes()[:sharable])
        assert shared == expected
        assert self.pool.available == available - match.cached
        assert [self.memory[page] for page in shared] == contents[: len(shared)]
        self.cached = [page for page in self.cached if page not in shared]
        holder.pages, holder.registered, holder.own = shared, len(shared), len(shared)
        self.live.append(holder)
        pages = self.take(len(letters) - len(shared))
        if pages is None:
            self.drop(holder)
            return multiple()
        holder.pages = shared + pages
        self.memory.update(zip(pages, contents[len(shared) :], strict=True))
        return holder

    @rule(holder=holders, letter=st.integers(0, 1))
    def grow(self, holder: Holder, letter: int) -> None:
        if holder not in self.live or (pages := self.take(1)) is None:
            return
        holder.letters.append(letter)
        holder.pages += pages
        self.memory[pages[0]] = holder.contents()[-1]

    @rule(holder=holders, count=st.integers(1, 5))
    def register(self, holder: Holder, count: int) -> None:
        if holder not in self.live:
            return
        stop = min(holder.registered + count, len(holder.pages))
        for index in range(holder.registered, stop):
            page, content = holder.pages[index], holder.contents()[index]
            new = content not in self.known
            assert self.pool.register(page, holder.hashes()[index]) == new
            if new:
                self.known[content] = page
        holder.registered = stop

    @rule(holder=consumes(holders))
    def finish(self, holder: Holder) -> None:
        if holder in self.live:
            self.drop(holder)

    @rule(holder=holders, back=st.integers(1, 3))
    def fail(self, holder: Holder, back: int) -> None:
        """A step that wrote the last pages failed: they, and what others computed after them, are forgotten."""
        start = max(len(holder.pages) - back, holder.own) if holder in self.live else 0
        if holder not in self.live or start == len(holder.pages):
            return
        wrong = holder.pages[start:]
        for other in [each for each in self.live if set(each.pages) & set(wrong)]:
            first = min(other.pages.index(page) for page in wrong if page in other.pages)
            bad = other.pages[first:]
            self.pool.forget(bad)
            self.known = {content: page for content, page in self.known.items() if page not in bad}
            self.memory.update(dict.fromkeys(bad))
            self.drop(other)

    @rule(pages=st.lists(st.integers(0, 8), max_size=4))
    def forget_cached(self, pages: list[int]) -> None:
        wrong = [page for page in pages if page in self.cached]
        self.pool.forget(wrong)
        self.cached = [page for page in self.cached if page not in wrong]
        self.known = {content: page for content, page in self.known.items() if page not in wrong}

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.known, self.cached = {}, []

    def drop(self, holder: Holder) -> None:
        self.live.remove(holder)
        available = self.pool.available + self.pool.unshared(holder.pages)
        self.pool.release(holder.pages)
        assert self.pool.available == available
        for page in reversed(holder.pages):
            if page in self.known.values() and not self.users(page):
                self.cached.append(page)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity([holder.pages for holder in self.live])
        used = {page for holder in self.live for page in holder.pages}
        assert (self.pool.cached, self.pool.used) == (len(self.cached), len(used))
        assert self.pool.evicted_pages == self.evicted
        for content, page in self.known.items():
            assert self.memory[page] == content
        for holder in self.live:
            assert [self.memory[page] for page in holder.pages] == holder.contents()


Pages.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPages = Pages.TestCase


def hashed(count: int) -> list[bytes]:
    return [index.to_bytes(16, "little") for index in range(count)]


def filled(pages: int) -> PagePool:
    """Return a pool whose pages are all cached, in the order of their numbers."""
    pool = PagePool(pages)
    taken = pool.allocate(pages)
    for page, content in zip(taken, hashed(pages), strict=True):
        assert pool.register(page, content)
    pool.release(taken)
    return pool


def test_the_last_page_of_a_sequence_is_evicted_first() -> None:
    pool = filled(4)
    pool.allocate(1)
    assert pool.match(hashed(4)) == PrefixMatch(3, 3)
    pool.allocate(2)
    assert pool.match(hashed(4)) == PrefixMatch(1, 1)


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = filled(4)
    first = pool.share(hashed(1))
    pool.forget(first)
    pool.release(first)
    assert (pool.free, pool.cached) == (1, 3)
    assert pool.allocate(1) == first
    assert pool.evicted_pages == 0


def test_a_shared_page_is_evicted_after_pages_that_were_released_later() -> None:
    pool = filled(3)
    kept = pool.share(hashed(1))
    pool.release(kept)
    pool.allocate(2)
    assert pool.match(hashed(3)) == PrefixMatch(1, 1)


def test_nothing_changes_if_too_few_pages_are_available() -> None:
    pool = filled(3)
    pool.share(hashed(1))
    with pytest.raises(OutOfPages, match="expected 3 free or cached pages, got 2 of 3"):
        pool.allocate(3)
    assert (pool.free, pool.cached, pool.used, pool.evicted_pages) == (0, 2, 1, 0)
    assert pool.match(hashed(3)) == PrefixMatch(3, 2)


def test_equal_content_computed_twice_stays_private_the_second_time() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    assert pool.register(first[0], b"content")
    assert not pool.register(second[0], b"content")
    pool.release(second)
    assert (pool.free, pool.cached) == (1, 0)
    assert pool.share([b"content"]) == first


def test_a_forgotten_page_is_no_longer_shared_but_its_sharers_keep_it() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.register(pages[0], b"content")
    assert pool.share([b"content"]) == pages
    pool.forget(pages)
    assert pool.share([b"content"]) == []
    pool.release(pages)
    assert pool.used == 1
    pool.release(pages)
    assert (pool.free, pool.cached) == (2, 0)


def test_tokens_are_counted() -> None:
    pool = filled(3)
    pool.share([*hashed(2), b"unknown"])
    assert (pool.asked_tokens, pool.shared_tokens) == (3 * PAGE_TOKENS, 2 * PAGE_TOKENS)


def test_misuse_raises() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="page 1: release"):
        pool.release([1])
    with pytest.raises(ValueError, match="page 1: register of a page that no sequence uses"):
        pool.register(1, b"content")
    (page,) = pool.allocate(1)
    pool.register(page, b"content")
    with pytest.raises(ValueError, match="has a hash already"):
        pool.register(page, b"other")


def test_a_reference_that_no_sequence_holds_is_found() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    pool.check_integrity()
    with pytest.raises(IntegrityError, match="page 1: 1 references, but 0 sequences hold it"):
        pool.check_integrity([[0]])


def test_the_pool_tells_how_long_it_keeps_pages() -> None:
    now_s = 10.0
    pool = PagePool(2, lambda: now_s)
    for content in (b"one", b"two"):
        (page,) = pool.allocate(1)
        pool.register(page, content)
        pool.release([page])
        now_s += 5
    assert pool.kept_s == inf
    pool.allocate(1)
    assert pool.kept_s == 10, "the page that was released at 10 is gone, and later ones are there"
    now_s += 1
    assert pool.kept_s == 11
    pool.forget_all()
    assert pool.kept_s == 0
