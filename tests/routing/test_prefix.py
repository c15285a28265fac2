"""Hashes of pages, and the table of which replicas have them."""

from math import inf

import numpy as np
import pytest

from ranklet.replicas.cache import pages
from ranklet.routing.prefix import MAX_PAGES, PAGE_TOKENS, PrefixTable, page_hashes, prefix_root

ROOT = prefix_root("legal", "v1", "")


def ids(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 150_000, tokens).astype(np.int32)


def table(*replicas: str) -> PrefixTable:
    made = PrefixTable()
    made.set_members(replicas)
    return made


def cached(made: PrefixTable, prompt: list[int]) -> list[float] | None:
    found = made.match(prompt)
    return None if found is None else found.tokens.tolist()


def test_pages_are_those_of_the_engine() -> None:
    assert PAGE_TOKENS == pages.PAGE_TOKENS


def test_prompts_share_the_hashes_of_their_common_pages_only() -> None:
    one = ids(1000)
    other = one.copy()
    other[130] += 1  # in the third page
    first, second = page_hashes(ROOT, one), page_hashes(ROOT, other)
    assert len(first) == 1000 // PAGE_TOKENS
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    assert page_hashes(ROOT, one[:200]) == first[:3]
    assert page_hashes(ROOT, one[:63]) == []


def test_equal_pages_at_different_places_have_different_hashes() -> None:
    page = ids(PAGE_TOKENS)
    assert len(set(page_hashes(ROOT, np.tile(page, 8)))) == 8


@pytest.mark.parametrize("other", [("tax", "v1", ""), ("legal", "v2", ""), ("legal", None, ""), (None, "v1", ""),
                                   ("legal", "v1", "tenant")])  # fmt: skip
def test_prompts_with_another_root_share_nothing(other: tuple[str | None, str | None, str]) -> None:
    assert not set(page_hashes(ROOT, ids(640))) & set(page_hashes(prefix_root(*other), ids(640)))


def test_names_that_are_no_unicode_have_a_root() -> None:
    assert prefix_root("\ud800", None, "\udfff") != prefix_root("\ud801", None, "\udfff")


def test_long_prompts_have_a_bounded_number_of_hashes() -> None:
    assert len(page_hashes(ROOT, ids(PAGE_TOKENS * (MAX_PAGES + 9)))) == MAX_PAGES


def test_the_deepest_known_page_of_each_replica_counts() -> None:
    made = table("r0", "r1", "r2")
    made.learn("r0", [3], -inf, 0.0)
    made.learn("r1", [3, 5], -inf, 0.0)
    assert cached(made, [1, 2, 3, 4, 5, 6]) == [3 * 64, 5 * 64, 0]
    assert cached(made, [1, 2, 9, 4]) is None
    found = made.match([1, 2, 3, 4, 5, 6])
    assert found is not None
    assert list(found.longest) == [1]


def test_many_holders_are_looked_up_as_few_are() -> None:
    made = table(*(f"r{i}" for i in range(40)))
    for i in range(0, 40, 2):
        made.learn(f"r{i}", [7], -inf, float(i))
    made.learn("r4", [], 5.0, 50.0)  # it evicted pages that were last used at 5
    found = made.match([7, 8])
    assert found is not None
    assert np.flatnonzero(found.tokens).tolist() == [i for i in range(0, 40, 2) if i != 4]
    assert found.longest == ()


def test_a_replica_that_evicted_later_pages_no_longer_has_one() -> None:
    made = table("r0")
    made.learn("r0", [1], -inf, 10.0)
    made.learn("r0", [], 9.0, 11.0)
    assert cached(made, [1]) == [64]
    made.learn("r0", [2], 10.5, 12.0)
    assert cached(made, [1]) is None
    assert cached(made, [2]) == [64]
    made.learn("r0", [], 0.0, 13.0)  # an older report
    assert cached(made, [1]) is None


def test_own_requests_count_at_once_and_use_known_pages_again() -> None:
    made = table("r0", "r1")
    made.learn("r0", [2], -inf, 0.0)
    made.add([1, 2, 3], 1, 5.0)
    assert cached(made, [1, 2, 9]) == [128, 128]
    made.drop([1, 2, 3], 1, 128)
    assert cached(made, [1, 2, 3]) == [128, 128]
    made.drop([1, 2, 3], 1, 0)
    assert cached(made, [1, 2, 3]) == [128, 0]


def test_entries_follow_replicas_to_other_indices() -> None:
    made = table("r0", "r1")
    made.learn("r1", [1], -inf, 0.0)
    made.set_members(["r1", "r2"])
    assert cached(made, [1]) == [64, 0]
    made.set_members(["r2"])
    assert cached(made, [1]) is None
    made.learn("r1", [3], -inf, 0.0)
    assert cached(made, [3]) is None, "news of a replica that is gone"
