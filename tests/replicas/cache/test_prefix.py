"""Hashes of prefixes: equal content has equal hashes, and different roots or tokens never do."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.cache.prefix import PrefixRoot, base_revision, page_hashes, sharable_pages
from ranklet.replicas.errors import ModelError

ROOT = PrefixRoot("base", "adapter", "salt", "bfloat16")
LONG_AGO = (1_000_000_000, 1_000_000_000)  # ns

roots = st.builds(PrefixRoot, *[st.text(st.sampled_from("ab\x00\ud800"), max_size=3)] * 4)


@pytest.mark.parametrize("field", PrefixRoot._fields)
def test_roots_differ_by_each_field(field: str) -> None:
    other = ROOT._replace(**{field: "other"})
    assert other.digest() != ROOT.digest()
    ids = np.arange(PAGE_TOKENS)
    assert page_hashes(other, ids) != page_hashes(ROOT, ids)


@given(roots, roots)
def test_roots_are_equal_only_if_all_fields_are(one: PrefixRoot, other: PrefixRoot) -> None:
    assert (one.digest() == other.digest()) == (one == other)


def test_text_that_moves_to_the_next_field_makes_another_root() -> None:
    seen = {PrefixRoot(*fields).digest() for fields in (("ab", "", "", ""), ("a", "b", "", ""), ("", "ab", "", ""))}
    assert len(seen) == 3


@given(st.integers(0, 5 * PAGE_TOKENS), st.lists(st.integers(0, 5), max_size=3))
def test_hashes_that_are_continued_equal_those_made_at_once(length: int, cuts: list[int]) -> None:
    ids = np.random.default_rng(length).integers(0, 151_669, length)
    whole = page_hashes(ROOT, ids)
    assert len(whole) == length // PAGE_TOKENS
    known: list[bytes] = []
    for pages in sorted(cuts):
        known += page_hashes(ROOT, ids[: pages * PAGE_TOKENS + 1], known)
    assert known + page_hashes(ROOT, ids, known) == whole


@given(st.integers(0, 4 * PAGE_TOKENS - 1))
def test_a_changed_token_changes_the_hashes_from_its_page_on(position: int) -> None:
    ids = np.zeros(4 * PAGE_TOKENS, np.int32)
    before = page_hashes(ROOT, ids)
    ids[position] = 1
    after = page_hashes(ROOT, ids)
    page = position // PAGE_TOKENS
    assert before[:page] == after[:page]
    assert not set(before[page:]) & set(after[page:])


@given(st.integers(1, 4 * PAGE_TOKENS), st.integers(1, 4 * PAGE_TOKENS), st.integers(0, 4))
def test_pages_are_those_of_the_base_until_the_adapter_changes_a_token(first: int, other: int, known: int) -> None:
    ids = np.arange(4 * PAGE_TOKENS, dtype=np.int32)
    base, late = page_hashes(ROOT._replace(adapter_revision=""), ids), page_hashes(ROOT, ids, (), first)
    page = first // PAGE_TOKENS
    assert late[:page] == base[:page]
    assert not set(late[page:]) & {*base, *page_hashes(ROOT, ids), *page_hashes(ROOT._replace(salt=""), ids, (), first)}
    assert late[:known] + page_hashes(ROOT, ids, late[:known], first) == late
    if first != other:
        differ = min(first, other) // PAGE_TOKENS
        assert not set(late[differ:]) & set(page_hashes(ROOT, ids, (), other)[differ:]), "keys and values differ"


def test_hashes_do_not_depend_on_the_integer_type_or_layout() -> None:
    ids = np.arange(2 * PAGE_TOKENS, dtype=np.int32)
    assert page_hashes(ROOT, ids.astype(np.int64)) == page_hashes(ROOT, ids)
    assert page_hashes(ROOT, np.repeat(ids, 2)[::2]) == page_hashes(ROOT, ids)


def test_hashes_are_equal_in_every_version() -> None:
    """Replicas of different versions may name the same prefix to a router."""
    assert page_hashes(ROOT, np.arange(PAGE_TOKENS))[0].hex() == "6c8ec70c599924e9b3cb7cef87525845"


@pytest.mark.parametrize(("tokens", "pages"), [(1, 0), (64, 0), (65, 1), (128, 1), (129, 2)])
def test_the_page_of_the_last_token_is_not_shared(tokens: int, pages: int) -> None:
    assert sharable_pages(tokens) == pages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    return folder


def test_a_base_revision_depends_on_content_only(folder: Path) -> None:
    first = base_revision(folder)
    os.utime(folder / "config.json", ns=LONG_AGO)
    (folder / "tokenizer.json").write_text("not read by the decoder")
    assert base_revision(folder) == first
    assert base_revision(shutil.copytree(folder, folder.parent / "elsewhere")) == first
    assert first == base_revision(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_base_revision_changes_with_each_file_even_if_size_and_times_do_not(folder: Path, name: str) -> None:
    path = folder / name
    os.utime(path, ns=LONG_AGO)
    first = base_revision(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=LONG_AGO)
    assert base_revision(folder) != first


def test_a_base_revision_covers_the_shards_that_the_index_names(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "one.safetensors").write_bytes(b"1")
    with pytest.raises(ModelError, match=r"two\.safetensors: cannot be read"):
        base_revision(folder)
    (folder / "two.safetensors").write_bytes(b"2")
    first = base_revision(folder)
    (folder / "model.safetensors").write_bytes(b"the index does not name it")
    assert base_revision(folder) == first
    (folder / "two.safetensors").write_bytes(b"3")
    assert base_revision(folder) != first
