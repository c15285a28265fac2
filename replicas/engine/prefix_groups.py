"""Groups the decodes of a step that begin with the same pages, so that attention reads these pages once a group.

Texts share pages if they have the same adapter and their prompts begin with the same tokens: see `replicas/cache`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.cache.pages import PAGE_TOKENS

LEAST_SPANS = 8  # of a step that has groups; with them attention takes 2 us longer, which fewer spans do not save
# The fewest pages that a group shares. With fewer, the further splits take longer than reading each span alone, which
# a step of few spans does in small splits.
_LEAST_PAGES = 4
_LEAST_PAGES_OF_ONE = 512  # divided by the number of spans


class GroupedSpans(NamedTuple):
    """Spans of one token each, in the order of their groups.

    Attributes:
        rows: int64 [spans]: packed token of each.
        lengths: int32 [spans]: tokens of its sequence.
        pages: int32 [spans, P]: pages of its sequence.
        shared: int32 [spans]: tokens of the pages that it shares with its group; 0 if it is alone.
        firsts: int32 [spans]: where its group begins.
        members: int32 [spans]: size of its group.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int32]
    pages: NDArray[np.int32]
    shared: NDArray[np.int32]
    firsts: NDArray[np.int32]
    members: NDArray[np.int32]


def group_by_prefix(
    rows: NDArray[np.int64], lengths: NDArray[np.int32], pages: NDArray[np.int32], limit: int
) -> GroupedSpans:
    """Group spans so that few pages are read more than once.

    Args:
        lengths: with the token of this step, whose page belongs to its sequence alone.
        pages: entries past the length are any number.
        limit: the most spans of a group.
    """
    count = len(rows)
    spans = GroupedSpans(
        rows, lengths, pages, np.zeros(count, np.int32), np.arange(count, dtype=np.int32), np.ones(count, np.int32)
    )
    if limit == 1 or count < 2:
        return spans
    least = max(_LEAST_PAGES, _LEAST_PAGES_OF_ONE // count)
    whole = (lengths - 1) // PAGE_TOKENS
    if not _any_equal(pages[whole >= least, 0]):
        return spans
    read = pages[:, : whole.max() + 1]  # with the page of the last token, so that no order depends on older entries
    order = sorted(range(count), key=[row.tobytes() for row in read].__getitem__)
    read, whole = read[order], whole[order]
    differs = np.ones((count - 1, read.shape[1] + 1), dtype=np.bool_)
    np.not_equal(read[1:], read[:-1], out=differs[:, :-1])
    common = np.minimum(differs.argmax(1), np.minimum(whole[1:], whole[:-1]))
    groups = np.array(_groups(common.tolist(), limit, least), dtype=np.int32)
    if len(groups) == count:
        return spans
    sizes = groups[:, 0]
    firsts, members, shared = (np.repeat(array, sizes) for array in (sizes.cumsum(dtype=np.int32) - sizes, *groups.T))
    return GroupedSpans(rows[order], lengths[order], pages[order], shared * PAGE_TOKENS, firsts, members)


def _any_equal(pages: NDArray[np.int32]) -> bool:
    ordered = np.sort(pages)
    return bool((ordered[1:] == ordered[:-1]).any())


def _groups(common: list[int], limit: int, least: int) -> list[tuple[int, int]]:
    """Return the size of each group, and how many pages all of it share.

    Args:
        common: pages that each span shares with the next one.
        least: the fewest pages that a group shares.
    """
    groups = []
    members, shared = 1, 0
    for pages, following in zip(common, (*common[1:], 0), strict=True):
        with_next = pages if members == 1 else min(shared, pages)
        # A group takes the next span if that saves reading, unless the next shares much more with those behind it.
        saves = with_next >= least and members * with_next >= (members - 1) * shared
        if saves and members < limit and 2 * with_next >= following:
            members, shared = members + 1, with_next
        else:
            groups.append((members, shared))
            members, shared = 1, 0
    return [*groups, (members, shared)]
