"""The tokens that an adapter's tokenizer adds are those that transformers adds, with its ids, or are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from ranklet.replicas.adapters.added_tokens import BaseTokens, read_added_tokens
from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer, ComparedTokenizer
from ranklet.replicas.model.added_tokens import MAX_ADDED_TOKENS, AddedToken
from ranklet.replicas.model.tokenizer_files import UnusableTokenError
from tests.assets.tokenizer import save_with_added

Fields = dict[str, Any]


def as_transformers_has_them(base_dir: Path, folder: Path) -> list[AddedToken]:
    base, own = (AutoTokenizer.from_pretrained(each).added_tokens_decoder for each in (base_dir, folder))
    return [
        AddedToken(
            each.content, number, special=each.special, lstrip=each.lstrip, rstrip=each.rstrip,
            single_word=each.single_word, normalized=each.normalized,
        )
        for number, each in sorted(own.items())
        if number not in base
    ]  # fmt: skip


def test_saved_tokens_are_those_of_the_library(base_dir: Path, folder: Path) -> None:
    save_with_added(
        base_dir, folder, "<tool>", "Ġthe", tokenizers.AddedToken("naïve", lstrip=True, normalized=False),
        tokenizers.AddedToken("two words", rstrip=True, single_word=True),
        pad_token="[PAD]", extra_special_tokens=["<|user|>", "<|end|>"], eos_token="<|end|>",
    )  # fmt: skip
    found = read_added_tokens(folder, BaseTokens(base_dir))
    expected = as_transformers_has_them(base_dir, folder)
    assert list(found) == expected
    assert [token.content for token in found][:2] == ["Ġthe", "<tool>"]  # one of them has an id already
    assert {token.content: token.id for token in found}["<|end|>"] == 605
    assert BaseTokenizer(base_dir).compare(folder) == ComparedTokenizer(added=found)


def test_older_files_list_the_tokens_in_the_config(base_dir: Path, folder: Path) -> None:
    entry = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": True, "special": False}
    decoder = {"601": entry | {"content": "<two>"}, "600": entry | {"content": "<one>"}, "x": None, "602": 5}
    edit(folder / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=decoder))
    expected = tuple(
        AddedToken(text, number, rstrip=True, normalized=True) for text, number in (("<one>", 600), ("<two>", 601))
    )
    assert read_added_tokens(folder, BaseTokens(base_dir)) == expected
    (folder / "tokenizer.json").unlink()
    assert BaseTokenizer(base_dir).compare(folder) == ComparedTokenizer(added=expected)


def test_the_config_decides_about_flags(base_dir: Path, folder: Path) -> None:
    save_with_added(base_dir, folder, "<tool>")
    entry = {"content": "<tool>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {"600": entry | {"special": True}}
    edit(folder / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=decoder))
    expected = as_transformers_has_them(base_dir, folder)
    assert list(read_added_tokens(folder, BaseTokens(base_dir))) == expected
    assert (expected[0].lstrip, expected[0].special) == (True, True)


def test_a_special_token_of_the_vocabulary_becomes_an_added_one(base_dir: Path, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda content: content.update(mask_token="!"))
    expected = as_transformers_has_them(base_dir, folder)
    assert [token.content for token in expected] == ["!"]
    assert list(read_added_tokens(folder, BaseTokens(base_dir))) == expected


def test_copies_and_other_folders_add_nothing(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    base = BaseTokens(base_dir)
    assert read_added_tokens(folder, base) == ()
    save_with_added(base_dir, folder)
    assert read_added_tokens(folder, base) == ()
    assert read_added_tokens(tmp_path, base) == ()


def edit(path: Path, change: Callable[[Fields], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def entry(text: str, number: int) -> Fields:
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    return {"id": number, "content": text, **flags}


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([entry("<x>", 601)], "expected the id 600 for '<x>', which the base model's tokenizer gives it, got 601"),
        ([entry("<x>", 601), entry("<y>", 600)], "expected the id 600 for '<x>'"),
        ([entry("<x>", 2)], "expected the id 600 for '<x>'"),
        ([entry("!", 600)], "for '!', which the base model's tokenizer gives it, got 600"),
        ([entry("", 600)], "expected tokens of 1 to 256 characters, 600 has 0"),
        ([entry("x" * 257, 600)], "expected tokens of 1 to 256 characters, 600 has 257"),
        ([entry("\ud800", 600)], r"expected Unicode texts, 600 is '\ud800'"),
        ([entry(f"<{i}>", 600 + i) for i in range(MAX_ADDED_TOKENS + 1)], "at most 4096 tokens besides the base"),
        ([entry(f"{i:0256}", 600 + i) for i in range(600)], "at most 131072 characters besides the base model's"),
    ],
)
def test_bad_tokens_are_refused(tokens: list[Fields], says: str, base_dir: Path, folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"].extend(tokens))
    with pytest.raises(UnusableTokenError) as info:
        read_added_tokens(folder, BaseTokens(base_dir))
    assert says in str(info.value)
    assert BaseTokenizer(base_dir).compare(folder) == ComparedTokenizer((str(info.value),))


def test_entries_of_other_types_are_passed_over(base_dir: Path, folder: Path) -> None:
    odd: list[Any] = [None, [], {"content": 5, "id": 600}, {"content": "<x>", "id": True}, {"content": "<x>"}]
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"].extend(odd))
    assert read_added_tokens(folder, BaseTokens(base_dir)) == ()
