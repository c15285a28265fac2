"""The pages and rows of the sequences that keep keys and values: who holds which, and who may get more."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from ranklet.replicas.cache.pages import PAGE_TOKENS, PagePool, pages_of
from ranklet.replicas.cache.prefix import page_hashes, sharable_pages
from ranklet.replicas.engine.row_table import RowTable
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.stats import CacheRoom, KvCacheState


@dataclass(frozen=True, slots=True)
class Start:
    """Pages that a sequence finds and takes when it starts.

    Attributes:
        tokens: leading tokens whose pages are cached. The last token is always computed.
        pages: number of available pages that it takes.
        next_page: content hash of the first page that it would compute; None if others cannot share that page.
    """

    tokens: int
    pages: int
    next_page: bytes | None


@dataclass(slots=True)
class FreeSpace:
    """What is left while a step is planned.

    Attributes:
        computing: content hashes of the next pages of prompts that started sequences are computing.
        missed: those of them that sequences wait for which have not started, by the number of pages before.
    """

    pages: int
    rows: int
    computing: set[bytes] = field(default_factory=set)
    missed: dict[int, set[bytes]] = field(default_factory=dict)

    def miss(self, start: Start) -> None:
        """Take note of a page that a sequence waits for, so that others are known to wait for it too."""
        assert start.next_page is not None
        self.missed.setdefault(start.tokens // PAGE_TOKENS, set()).add(start.next_page)

    def lacks_page(self, sequence: Sequence) -> bool:
        """Return whether a sequence waits for a page that another was found to wait for."""
        if not self.missed or sequence.row is not None:
            return False
        hashes = sharable(sequence)
        return any(page < len(hashes) and hashes[page] in found for page, found in self.missed.items())


class KvSpace:
    """Gives pages and rows to sequences. The caller holds the engine's lock."""

    def __init__(self, pages: int, rows: int, max_tokens: int) -> None:
        self.pool = PagePool(pages)
        self.table = RowTable(rows, pages_of(max_tokens))

    def room(self) -> FreeSpace:
        return FreeSpace(self.pool.available, self.table.free)

    def find_start(self, sequence: Sequence, room: FreeSpace, reserved: int) -> Start | None:
        """Return what a sequence needs to start; None if there is no room for it.

        Args:
            reserved: number of pages that are left to others.
        """
        if not room.rows:
            return None
        found = self._to_start(sequence)
        if found.next_page in room.computing:
            room.miss(found)  # it can share that page in the next step
        elif found.pages + reserved > room.pages:
            room.rows = 0  # no later sequence takes the pages that this one waits for
        else:
            return found
        return None

    def _to_start(self, sequence: Sequence) -> Start:
        hashes = sharable(sequence)
        match = self.pool.match(hashes)
        pages = pages_of(sequence.length) - match.pages + match.cached
        missing = hashes[match.pages] if match.pages < len(hashes) else None
        return Start(match.pages * PAGE_TOKENS, pages, missing)

    def share(self, sequence: Sequence) -> None:
        """Give a sequence the cached pages of its tokens, so that they are not evicted for others."""
        sequence.pages = self.pool.share(sharable(sequence))

    def start(self, sequence: Sequence) -> None:
        """Give a sequence a row and, after `share`, the other pages of its known tokens."""
        shared = len(sequence.pages)
        pages = sequence.pages + self.pool.allocate(pages_of(sequence.length) - shared)
        sequence.row, sequence.pages = self.table.take(), pages
        sequence.computed = shared * PAGE_TOKENS
        sequence.published = shared
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        table, row = self.table, sequence.row
        table.set_pages(row, 0, pages)
        table.lengths[row] = sequence.computed
        slot = sequence.slot_at(sequence.length)
        table.slots[row] = -1 if slot is None else slot
        if sequence.sampling is not None:
            table.sampling[row] = sequence.sampling.columns(row)

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether the next token needs a page that the sequence does not have."""
        return sequence.computed == len(sequence.pages) * PAGE_TOKENS

    def extend(self, sequence: Sequence) -> None:
        """Give a sequence one more page."""
        assert sequence.row is not None
        page = self.pool.allocate(1)
        self.table.set_pages(sequence.row, len(sequence.pages), page)
        sequence.pages += page

    def publish(self, sequence: Sequence) -> None:
        """Let later sequences share the full pages that launched steps write and whose tokens are on the host."""
        hashes = sequence.hashes
        if hashes is None or sequence.root is None:
            return
        full = min(sequence.computed, sequence.length) // PAGE_TOKENS
        if full > len(hashes):
            ids = sequence.ids[: full * PAGE_TOKENS]
            hashes += page_hashes(sequence.root, ids, hashes, sequence.adapted_from)
        for page in range(sequence.published, full):
            self.pool.register(sequence.pages[page], hashes[page])
        sequence.published = max(sequence.published, full)

    def freed_by(self, sequence: Sequence) -> int:
        """Return how many pages become available when the sequence is released."""
        return self.pool.unshared(sequence.pages)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's row and pages."""
        if sequence.row is None:
            return
        self.pool.release(sequence.pages)
        self.table.give_back(sequence.row)
        sequence.row, sequence.pages, sequence.published = None, [], 0

    def forget(self) -> None:
        """Stop sharing all pages written until now, because a step has failed."""
        self.pool.forget_all()

    def cache_room(self) -> CacheRoom:
        return CacheRoom(self.pool.available * PAGE_TOKENS, self.pool.kept_s)

    def state(self, sequences: int, preemptions: int) -> KvCacheState:
        """Describe the cache, of which this many sequences hold pages."""
        pool = self.pool
        return KvCacheState(
            pool.count, pool.used, pool.cached, sequences, preemptions, pool.asked_tokens, pool.shared_tokens,
            pool.evicted_pages,
        )  # fmt: skip


def integrity_check(pool: PagePool, holders: Iterable[Sequence]) -> Callable[[], None]:
    """Return a check of the present state, to run without the lock: it takes time for each page.

    The check raises IntegrityError if a page is neither free nor cached nor held by a sequence.
    """
    return partial(pool.copy().check_integrity, [each.pages.copy() for each in holders])


def next_page(sequence: Sequence) -> bytes | None:
    """Return the content hash of the page that a started sequence computes next; None if it is not known yet."""
    page = sequence.computed // PAGE_TOKENS
    return sequence.hashes[page] if sequence.hashes is not None and page < len(sequence.hashes) else None


def sharable(sequence: Sequence) -> list[bytes]:
    """Return the content hashes of the pages that a sequence may start with."""
    if sequence.hashes is None or not sequence.reads_cache:
        return []
    return sequence.hashes[: sharable_pages(sequence.length)]
