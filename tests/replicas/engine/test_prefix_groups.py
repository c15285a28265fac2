"""Decodes that begin with the same pages are grouped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.prefix_groups import GroupedSpans, group_by_prefix

OTHERS = [[-1 - i] for i in range(128)]  # share nothing. A step of 128 sequences groups others by 4 common pages


def grouped(sequences: list[list[int]], limit: int = 8, spare: int = 3) -> GroupedSpans:
    """Group sequences of which the last page has one token. Entries behind it are those of the first sequence."""
    width = max(map(len, sequences)) + spare
    pages = np.resize(np.array(sequences[0], dtype=np.int32), (len(sequences), width))
    for row, own in zip(pages, sequences, strict=True):
        row[: len(own)] = own
    lengths = np.array([(len(own) - 1) * PAGE_TOKENS + 1 for own in sequences], dtype=np.int32)
    return group_by_prefix(np.arange(len(sequences)) + 100, lengths, pages, limit)


def groups_of(spans: GroupedSpans) -> dict[tuple[int, ...], int]:
    """Return the pages that each group of several sequences shares."""
    found: dict[int, list[int]] = {}
    for row, first, shared in zip(spans.rows.tolist(), spans.firsts.tolist(), spans.shared.tolist(), strict=True):
        if shared:
            found.setdefault(first, []).append(row - 100)
    return {tuple(sorted(rows)): int(spans.shared[first]) // PAGE_TOKENS for first, rows in found.items()}


def beginnings(*counts: int) -> list[list[int]]:
    """Return pages that different system prompts begin with."""
    return [list(range(-1000 * i, count - 1000 * i)) for i, count in enumerate(counts, 1)]


def test_sequences_with_one_system_prompt_are_a_group() -> None:
    one, two = beginnings(5, 9)
    spans = grouped([[*one, 1], [*two, 2], [7], [*one, 3, 4], [*two, 5], [*one, 6], *OTHERS])
    assert groups_of(spans) == {(0, 3, 5): 5, (1, 4): 9}
    assert spans.members.tolist() == [members for _, members in sorted(zip(spans.firsts, spans.members, strict=True))]


def test_a_group_has_at_most_as_many_members_as_a_program_computes() -> None:
    (one,) = beginnings(5)
    found = groups_of(grouped([*([*one, i] for i in range(7)), *OTHERS], limit=3))
    assert sorted(map(len, found)) == [3, 3]  # the last is alone
    assert not groups_of(grouped([*([*one, i] for i in range(7)), *OTHERS], limit=1))


def test_long_common_beginnings_come_before_short_ones() -> None:
    """Turns of one conversation share more than the system prompt of all."""
    (one,) = beginnings(4)
    talk = [*one, *range(50, 80)]
    assert groups_of(grouped([[*one, 900], [*talk, 1], [*talk, 2], [*talk, 3], *OTHERS])) == {(1, 2, 3): 34}
    assert groups_of(grouped([[*one, 0], [*talk, 1], [*talk, 2], [*talk, 3], *OTHERS])) == {(1, 2, 3): 34}


def test_short_beginnings_are_read_by_each_alone() -> None:
    (one,) = beginnings(3)
    spans = grouped([[*one, 1], [*one, 2], *OTHERS])
    assert not groups_of(spans)
    assert spans.rows.tolist() == list(range(100, 100 + len(spans.rows)))
    assert spans.members.tolist() == [1] * len(spans.rows)


def test_pages_behind_a_sequences_last_are_not_shared() -> None:
    (one,) = beginnings(9)
    assert groups_of(grouped([[*one, 1], one[:4], *OTHERS])) == {}
    assert groups_of(grouped([[*one, 1], [*one[:4], 2], *OTHERS])) == {(0, 1): 4}


@pytest.mark.parametrize(("count", "pages"), [(2, 256), (8, 64), (32, 16)])
def test_fewer_spans_need_more_common_pages(count: int, pages: int) -> None:
    (one, other) = beginnings(pages, pages - 1)
    assert set(grouped([[*one, i] for i in range(count)], count).members.tolist()) == {count}
    assert set(grouped([[*other, i] for i in range(count)], count).members.tolist()) == {1}


@pytest.mark.parametrize("count", [0, 1, 7])
def test_few_spans(count: int) -> None:
    given = np.arange(count), np.full(count, 500, np.int32), np.zeros((count, 9), np.int32)
    assert group_by_prefix(*given, 8).members.tolist() == [1] * count


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(1, 9)), max_size=40), st.integers(1, 8))
def test_any_sequences(branches: list[tuple[int, int, int]], limit: int) -> None:
    sequences, fresh = [[0, 1]], iter(range(2, 10_000))
    for parent, kept, added in branches:
        own = sequences[parent % len(sequences)]
        sequences.append([*own[: min(kept, len(own) - 1)], *(next(fresh) for _ in range(added))])
    sequences += OTHERS
    spans = grouped(sequences, limit)
    assert sorted(spans.rows.tolist()) == list(range(100, 100 + len(sequences)))
    for index, (row, first) in enumerate(zip(spans.rows.tolist(), spans.firsts.tolist(), strict=True)):
        own, shared = sequences[row - 100], int(spans.shared[index]) // PAGE_TOKENS
        assert spans.pages[index, : len(own)].tolist() == own
        assert spans.lengths[index] == (len(own) - 1) * PAGE_TOKENS + 1
        assert spans.members[index] == (spans.firsts == first).sum() <= limit
        assert first <= index < first + spans.members[index]
        assert shared < len(own)
        assert (shared > 0) == (spans.members[index] > 1)
        assert own[:shared] == sequences[int(spans.rows[first]) - 100][:shared]


@pytest.mark.parametrize("limit", [2, 8])
def test_no_page_of_full_groups_is_read_twice(limit: int) -> None:
    fresh = iter(range(100_000))
    sequences = [[*begin, next(fresh)] for begin in beginnings(*range(16, 32)) for _ in range(limit)]
    spans = grouped(sequences, limit)
    leads = spans.firsts == np.arange(len(sequences))
    read = spans.lengths // PAGE_TOKENS + 1 - spans.shared // PAGE_TOKENS + leads * spans.shared // PAGE_TOKENS
    assert read.sum() == len({page for own in sequences for page in own})
