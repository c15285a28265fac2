"""A tokenizer.json that is the base's but for added tokens is not parsed, and is compared as if it were."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer
from ranklet.replicas.adapters.tokenizer_content import BaseContent
from ranklet.replicas.adapters.tokenizer_process import TokenizerComparison
from tests.replicas.asking import ref

Fields = dict[str, Any]
OTHER_ADDED: dict[str, Callable[[Fields], Any]] = {
    "nothing": lambda content: None,
    "as the library": lambda content: content["added_tokens"].extend([entry("<x>", 600), entry("<y>", 601)]),
    "another id": lambda content: content["added_tokens"].append(entry("<x>", 601)),
    "a flag of the base's": lambda content: content["added_tokens"][0].update(lstrip=True),
    "a number as a flag": lambda content: content["added_tokens"][0].update(special=1),
    "an id that is no integer": lambda content: content["added_tokens"][0].update(id=0.0),
    "one of the base's less": lambda content: content["added_tokens"].pop(0),
    "another order": lambda content: content["added_tokens"].reverse(),
    "one of the base's twice": lambda content: content["added_tokens"].append(content["added_tokens"][0]),
    "one of the vocabulary": lambda content: content["added_tokens"].append(entry("!", content["model"]["vocab"]["!"])),
    "other types": lambda content: content["added_tokens"].extend([None, [], {"content": ["<x>"], "id": 600}]),
    "none": lambda content: content["added_tokens"].clear(),
}
OTHERS: dict[str, Callable[[Fields], Any]] = {
    "model": lambda content: content["model"]["merges"].reverse(),
    "step": lambda content: content.update(post_processor=None),
    "array": lambda content: content.update(added_tokens={}),
}


def entry(text: str, number: int) -> Fields:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": text, **flags}


def write(path: Path, content: Fields, *, as_library: bool) -> None:
    path.write_text(json.dumps(content, indent=2 if as_library else None, ensure_ascii=not as_library))


def is_parsed(base: BaseContent, folder: Path) -> bool:
    return base.read(folder)["model"] is not base.fields["model"]


def test_files_of_the_library_are_not_parsed(base_dir: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens(["<tool>", AddedToken("<|user|> €]", special=True)])
    tokenizer.save_pretrained(folder)
    base = BaseContent(base_dir)
    assert not is_parsed(base, folder)
    assert base.read(folder) == json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("change", sorted({**OTHER_ADDED, **OTHERS}))
def test_a_file_is_compared_as_one_that_is_parsed(change: str, base_dir: Path, folder: Path) -> None:
    path, base = folder / "tokenizer.json", BaseTokenizer(base_dir)
    content = json.loads(path.read_text())
    {**OTHER_ADDED, **OTHERS}[change](content)
    write(path, content, as_library=False)
    expected = base.compare(folder)
    assert is_parsed(BaseContent(base_dir), folder)
    write(path, content, as_library=True)
    assert base.compare(folder) == expected
    assert is_parsed(BaseContent(base_dir), folder) == (change in OTHERS)


def test_other_processes_find_the_same(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    compared, base = TokenizerComparison(base_dir), BaseTokenizer(base_dir)
    for name in ("as the library", "another id", "a flag of the base's", "model"):
        made = shutil.copytree(folder, tmp_path / name)
        content = json.loads((made / "tokenizer.json").read_text())
        {**OTHER_ADDED, **OTHERS}[name](content)
        write(made / "tokenizer.json", content, as_library=True)
        assert compared.compare(ref(made)) == base.compare(made), name


def with_entries(path: Path, entries: bytes) -> None:
    head, behind = path.read_bytes().split(b'"added_tokens": [', 1)
    _, tail = behind.split(b"\n  ],", 1)
    path.write_bytes(head + b'"added_tokens": [' + entries + b"\n  ]," + tail)


@pytest.mark.parametrize("entries", [b"{", b"\xff", b"[" * 100_000, b"] ["])
def test_entries_that_are_no_json_are_findings(entries: bytes, base_dir: Path, folder: Path) -> None:
    with_entries(folder / "tokenizer.json", entries)
    assert BaseTokenizer(base_dir).compare(folder).findings


def test_bytes_behind_the_array_are_parsed(base_dir: Path, folder: Path) -> None:
    base = BaseContent(base_dir)
    with_entries(folder / "tokenizer.json", b"")
    assert not is_parsed(base, folder)
    with_entries(folder / "tokenizer.json", b'], "x": [')
    assert is_parsed(base, folder)
