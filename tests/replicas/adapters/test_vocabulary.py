"""An adapter's tokenizer files must have the base model's ids."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ranklet.replicas.adapters.vocabulary import BaseVocabulary
from tests.cluster.text.small_tokenizers import MAKERS, make


@pytest.fixture(name="base_dir")
def _base_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    make("byte_level").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    return folder


def change(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content, indent=1))


def test_a_folder_without_tokenizer_files_fits(base_dir: Path, folder: Path) -> None:
    assert BaseVocabulary(base_dir).differences(folder) == ()


def test_equal_files_are_not_parsed(tmp_path: Path, folder: Path) -> None:
    for each in (tmp_path, folder):
        (each / "tokenizer.json").write_text("{no JSON")
    assert BaseVocabulary(tmp_path).differences(folder) == ()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_other_files_with_equal_ids_fit(name: str, tmp_path: Path, folder: Path) -> None:
    make(name).save(str(tmp_path / "tokenizer.json"))

    def edit(content: dict[str, Any]) -> None:
        content["truncation"] = None
        content["post_processor"] = None

    change(tmp_path, folder, edit)
    assert (folder / "tokenizer.json").read_bytes() != (tmp_path / "tokenizer.json").read_bytes()
    assert BaseVocabulary(tmp_path).differences(folder) == ()


def test_an_added_token_is_named(base_dir: Path, folder: Path) -> None:
    tokenizer = make("byte_level")
    size = tokenizer.get_vocab_size()

    def edit(content: dict[str, Any]) -> None:
        content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "<|pad|>"})

    change(base_dir, folder, edit)
    (finding,) = BaseVocabulary(base_dir).differences(folder)
    assert finding == (
        f"tokenizer.json: expected the ids of the base model's {size} tokens, to which an adapter's tokenizer may only "
        f"add others; 1 differ: '<|pad|>' is {size} (not in the base model)"
    )
    assert BaseVocabulary(base_dir).differences(folder, {"<|pad|>"}) == ()


def test_a_moved_and_a_missing_token_are_named(base_dir: Path, folder: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["he"] = 399
        del vocabulary["a"]

    change(base_dir, folder, edit)
    (finding,) = BaseVocabulary(base_dir).differences(folder)
    tokenizer = make("byte_level")
    assert "2 differ" in finding
    assert f"'a' is missing (base model: {tokenizer.token_to_id('a')})" in finding
    assert f"'he' is 399 (base model: {tokenizer.token_to_id('he')})" in finding


def test_up_to_five_tokens_are_named(base_dir: Path, folder: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: number + 1 for token, number in vocabulary.items()}
        content["added_tokens"] = []

    change(base_dir, folder, edit)
    (finding,) = BaseVocabulary(base_dir).differences(folder)
    assert finding.count("(base model:") == 5
    assert "; and 397 more" in finding


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"added_tokens": {"<|im_end|>": 2, "<tool>": 400}}, None),
        ({"added_tokens": {"<|im_end|>": 9}}, "'<|im_end|>' is 9 (base model: 2)"),
        ({"tokenizer_config": {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}}}, None),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"402": {"content": "<new>"}}}},
            "'<new>' is 402 (not in the base",
        ),
        ({"vocab": {"<s>": 0, "</s>": 1}}, None),
        ({"vocab": {"<s>": 1, "</s>": 0}}, "vocab.json: expected the ids"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, None),
        ({"added_tokens": [1]}, "added_tokens.json: expected a JSON object"),
        ({"tokenizer": "x"}, "tokenizer.json: expected a JSON object"),
    ],
)
def test_folders_without_a_tokenizer_json(
    files: dict[str, Any], says: str | None, base_dir: Path, folder: Path
) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    found = BaseVocabulary(base_dir).differences(folder)
    assert (found == ()) if says is None else (says in found[0])


def test_large_files_are_refused(base_dir: Path, folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    (finding,) = BaseVocabulary(base_dir).differences(folder)
    assert finding == "tokenizer.json: expected at most 67108864 bytes, got 67108865"


def test_a_base_without_json_files_compares_bytes_only(tmp_path: Path, folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<x>": 1}')
    (finding,) = BaseVocabulary(tmp_path).differences(folder)
    assert "cannot be compared" in finding


def test_smollms_files(smollm_dir: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm_dir / name, folder / name)
    base = BaseVocabulary(smollm_dir)
    assert base.differences(folder) == ()
    change(smollm_dir, folder, lambda content: content["model"]["vocab"].update({"<new>": 49152}))
    (finding,) = base.differences(folder)
    assert "'<new>' is 49152 (not in the base model)" in finding
