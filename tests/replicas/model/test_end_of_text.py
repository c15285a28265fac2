"""The tokens that end a text come from the base's configs and from the adapter's tokenizer."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.end_of_text import EndOfText
from ranklet.replicas.model.tokenizer_files import UnusableTokenError, Vocabulary
from tests.assets.tokenizer import CHAT_EOS

VOCAB = 1000
BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 2}}, "added_tokens": [{"id": 9, "content": "<|im_end|>"}]}


def save(folder: Path, **files: Any) -> Path:
    """Write JSON files by their names without `.json`."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def base_ids(folder: Path, config: Any = None) -> tuple[int, ...]:
    return EndOfText(folder, SimpleNamespace(eos_token_id=config), VOCAB).base_ids


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 5}, 7, (5,)),
        ({"eos_token_id": [128, 5, 5]}, 7, (5, 128)),
        ({"eos_token_id": None}, 7, (7,)),
        ({}, [7, 3], (3, 7)),
        (None, 7, (7,)),
        (None, None, ()),
    ],
)
def test_the_ids_of_generation_config_replace_those_of_the_config(
    generation: dict[str, Any] | None, config: Any, ids: tuple[int, ...], tmp_path: Path
) -> None:
    if generation is not None:
        save(tmp_path, generation_config=generation)
    assert base_ids(tmp_path, config) == ids


@pytest.mark.parametrize(
    ("token", "ids"),
    [
        ("<|im_end|>", (5, 9)),
        ({"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}, (5, 9)),
        ("</s>", (2, 5)),
        (None, (5,)),
        ("<unknown>", (5,)),
    ],
)
def test_the_bases_own_eos_token_is_added(token: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    save(tmp_path, generation_config={"eos_token_id": [5]}, tokenizer_config={"eos_token": token}, tokenizer=BPE)
    assert base_ids(tmp_path) == ids


@pytest.mark.parametrize("wrong", ["5", [5, "x"], {"id": 5}, True, 5.0])
def test_an_eos_token_id_that_is_no_id_is_refused(wrong: Any, tmp_path: Path) -> None:
    save(tmp_path, generation_config={"eos_token_id": wrong})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        base_ids(tmp_path)


@pytest.mark.parametrize("wrong", [-1, VOCAB, [5, VOCAB]])
def test_an_id_without_a_logit_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: eos_token_id: expected ids from 0 to 999"):
        base_ids(tmp_path, wrong)
    save(tmp_path, generation_config={"eos_token_id": wrong})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id: expected ids from 0 to 999"):
        base_ids(tmp_path, 5)


def test_a_file_of_the_base_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: expected JSON"):
        base_ids(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> EndOfText:
    return EndOfText(save(tmp_path / "base", tokenizer=BPE), SimpleNamespace(), VOCAB)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"tokenizer_config": {}}, ()),
        ({"tokenizer_config": {"eos_token": None}}, ()),
        ({"tokenizer_config": {"eos_token": ""}}, ()),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (9,)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, (2,)),
        ({"tokenizer_config": {"eos_token": "<x>", "added_tokens_decoder": {"44": {"content": "<x>"}}}}, (44,)),
        ({"tokenizer_config": {"eos_token": "<x>"}, "added_tokens": {"<x>": 45}}, (45,)),
    ],
)
def test_an_adapters_eos_token_is_found_in_its_own_files_or_the_bases(
    files: dict[str, Any], ids: tuple[int, ...], base: EndOfText, tmp_path: Path
) -> None:
    assert base.adapter_ids(save(tmp_path / "adapter", **files)) == ids


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config": {"eos_token": "<|gone|>"}}, "one of the folder's added tokens, got '<|gone|>'"),
        (
            {"tokenizer_config": {"eos_token": "<x>", "added_tokens_decoder": {"1000": {"content": "<x>"}}}},
            "expected an id below the base model's 1000 logits, got 1000 for '<x>'",
        ),
        ({"tokenizer_config": {"eos_token": "<x>"}, "added_tokens": {"<x>": -1}}, "got -1 for '<x>'"),
        (
            {"tokenizer_config": {"eos_token": "<x>"}, "tokenizer": {"added_tokens": [{"id": 46, "content": "<x>"}]}},
            "one of the folder's added tokens, got '<x>'",
        ),
        ({"tokenizer_config": {"eos_token": 7}}, "expected a token, got 7"),
        ({"tokenizer_config": {"eos_token": {"content": [7]}}}, "expected a token"),
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object, got list"),
    ],
)
def test_an_eos_token_without_a_usable_id_is_refused_by_name(
    files: dict[str, Any], says: str, base: EndOfText, tmp_path: Path
) -> None:
    with pytest.raises(UnusableTokenError) as refused:
        base.adapter_ids(save(tmp_path / "adapter", **files))
    assert says in str(refused.value)


def test_a_base_without_a_tokenizer_json_has_the_tokens_of_its_vocabulary(tmp_path: Path) -> None:
    base = EndOfText(save(tmp_path / "base", vocab={"</s>": 2}), SimpleNamespace(), VOCAB)
    assert base.adapter_ids(save(tmp_path / "adapter", tokenizer_config={"eos_token": "</s>"})) == (2,)


def test_strange_tokenizer_files_name_no_ids(base: EndOfText, tmp_path: Path) -> None:
    """Files of an adapter are untrusted: any JSON object is read without an error."""
    folder = save(
        tmp_path / "adapter",
        tokenizer_config={
            "eos_token": "</s>",
            "added_tokens_decoder": {"x": {}, "²": 5, "7": {"content": 7}, "8": [], "9" * 9999: {}},
        },
        added_tokens={"</s>": "2"},
        tokenizer={"model": {"vocab": [[], 7, ["</s>"]]}, "added_tokens": {"id": 3}},
    )
    assert base.adapter_ids(folder) == (2,)


def test_a_pipe_in_place_of_a_tokenizer_file_is_not_read(base: EndOfText, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(UnusableTokenError, match=r"tokenizer_config\.json: expected a file"):
        base.adapter_ids(tmp_path)


def test_large_files_are_refused(base: EndOfText, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(" " * (4 << 20) + "{}")
    with pytest.raises(UnusableTokenError, match="expected at most 4194304 bytes, got 4194306"):
        base.adapter_ids(tmp_path)


def test_the_ids_of_a_saved_model_are_those_of_its_tokenizer(model_dir: Path) -> None:
    wanted = AutoTokenizer.from_pretrained(str(model_dir)).convert_tokens_to_ids(CHAT_EOS)
    assert Vocabulary(model_dir).id_of(CHAT_EOS) == wanted
    assert wanted in base_ids(model_dir)
