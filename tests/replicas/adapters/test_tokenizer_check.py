"""An adapter's tokenizer files encode texts as the base model's do, or are refused with what differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer, ComparedTokenizer

Fields = dict[str, Any]
SAME = ComparedTokenizer()


def edit(path: Path, change: Callable[[Fields], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_copies_are_harmless_as_any_library_saves_them(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    base = BaseTokenizer(base_dir)
    assert base.compare(folder) == SAME
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert base.compare(tmp_path / "saved") == SAME

    def as_older_releases(content: Fields) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        del content["model"]["ignore_merges"]

    edit(folder / "tokenizer.json", as_older_releases)
    assert base.compare(folder) == SAME
    (folder / "tokenizer_config.json").unlink()
    assert base.compare(folder) == SAME


CHANGES: dict[str, Callable[[Fields], Any]] = {
    "normalizer": lambda content: content.update(normalizer=None),
    "pre_tokenizer": lambda content: content["pre_tokenizer"]["pretokenizers"].pop(0),
    "post_processor": lambda content: content.update(post_processor=None),
    "model: expected {'merges'": lambda content: content["model"]["merges"].reverse(),
    "added_tokens": lambda content: content["added_tokens"][0].update(lstrip=True),
    "tokenizer.json: decoder": lambda content: content.update(decoder={"type": "Fuse"}),
    "expected the id 600 for '<pad>'": lambda content: content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 601, "content": "<pad>"}
    ),
    "'<pad>' is 600 (not in the base model)": lambda content: content["model"]["vocab"].update({"<pad>": 600}),
}


@pytest.mark.parametrize("says", sorted(CHANGES))
def test_another_tokenizer_is_refused_with_what_differs(says: str, base_dir: Path, folder: Path) -> None:
    edit(folder / "tokenizer.json", CHANGES[says])
    base = BaseTokenizer(base_dir)
    (finding,) = base.compare(folder).findings
    assert says in finding
    assert base.compare(folder).findings == (finding,)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"add_bos_token": True}, "add_bos_token: expected None as the base model has, got True"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class"),
        ({"pad_token": "[PAD]"}, "pad_token: expected a token of the base model or of tokenizer.json, got '[PAD]'"),
        ({"extra_special_tokens": ["<tool>"]}, "extra_special_tokens: expected a token of the base model"),
        (
            {"added_tokens_decoder": {"1": {"content": "<|im_end|>", "special": True, "lstrip": True}}},
            "added_tokens_decoder: expected {'<|im_end|>': []} as the base model has, got {'<|im_end|>': ['lstrip']}",
        ),
        ({"added_tokens_decoder": {"1": {"content": "<|im_end|>", "special": True, "normalized": False}}}, None),
        ({"add_bos_token": False, "model_max_length": 3, "padding_side": "right", "chat_template": "x"}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": {"content": "<|im_end|>"}}, None),
    ],
)
def test_fields_of_the_config(fields: Fields, says: str | None, base_dir: Path, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda content: content.update(fields))
    found = BaseTokenizer(base_dir).compare(folder).findings
    assert (found == ()) if says is None else (says in found[0])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("merges.txt", "#version: 0.2\na b\n", "merges.txt: expected the base model's merges"),
        ("tokenizer.model", "other", "tokenizer.model: expected the base model's file"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer to it; run `git lfs pull`"),
        ("tokenizer.json", "[]", "tokenizer.json: expected a JSON object"),
    ],
)
def test_other_files(name: str, content: str, says: str, base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    (finding,) = BaseTokenizer(base_dir).compare(tmp_path).findings
    assert says in finding


def test_added_tokens_json_beside_tokenizer_json(base_dir: Path, folder: Path) -> None:
    """The library reads it unless tokenizer_config.json lists the added tokens."""
    base, path = BaseTokenizer(base_dir), folder / "added_tokens.json"
    path.write_text(json.dumps({"<|im_end|>": 1}))
    assert base.compare(folder) == SAME
    path.write_text(json.dumps({"<|im_end|>": 1, "<other>": 600}))
    expected = AutoTokenizer.from_pretrained(base_dir)("a <other> b")["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)("a <other> b")["input_ids"] != expected
    (finding,) = base.compare(folder).findings
    assert finding.startswith("added_tokens.json: expected the ids of the base model's")
    assert "'<other>' is 600 (not in the base model)" in finding
    edit(folder / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder={}))
    assert AutoTokenizer.from_pretrained(folder)("a <other> b")["input_ids"] == expected
    assert base.compare(folder) == SAME


def test_merges_of_the_base_are_accepted_as_a_file(base_dir: Path, tmp_path: Path) -> None:
    model = json.loads((base_dir / "tokenizer.json").read_text())["model"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    assert BaseTokenizer(base_dir).compare(tmp_path) == SAME
