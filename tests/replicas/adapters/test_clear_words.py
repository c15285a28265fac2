"""A refusal says what the folder is, if that is known: Git LFS pointers, another method than LoRA, a hub's cache."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.nested import adapter_below
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.errors import InvalidAdapter, ModelError
from ranklet.replicas.model.architecture import read_config
from ranklet.replicas.model.checkpoint import Checkpoint
from ranklet.replicas.model.pooling import read_pooling
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.adapters import load_base, quiet, save_adapter
from tests.assets.make import make_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 161533192\n"
LFS = "expected the file itself, got a Git LFS pointer to it; run `git lfs pull`"


def findings(folder: Path, expectation: ExpectedModules) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(AdapterRef(folder.name, str(folder), "1"), expectation)
    return caught.value.findings


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_git_lfs_pointer_in_an_adapters_folder_is_named(
    name: str, model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    folder = save_adapter(model_dir, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    (folder / name).write_text(POINTER)
    assert findings(folder, expectation) == (f"{name}: {LFS} where it was cloned",)


def open_checkpoint(folder: Path) -> None:
    with Checkpoint(folder, torch.device("cpu"), torch.float32):
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "modules.json": read_pooling,
    "1_Pooling/config.json": read_pooling,
    "tokenizer.json": PromptTokenizer,
    "model.safetensors": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_git_lfs_pointer_in_the_base_models_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=16, intermediate_size=16, layers=1, heads=1, kv_heads=1)
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError) as caught:
        READERS[name](folder)
    assert caught.value.message.startswith(str(folder))
    assert f"{name}: {LFS}" in caught.value.message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "'PREFIX_TUNING', which is prefix tuning"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "'PROMPT_TUNING', which is prompt tuning"),
        (OFTConfig(oft_block_size=4, target_modules=["q_proj"]), "'OFT', which is orthogonal fine-tuning"),
    ],
    ids=["prefix", "prompt", "oft"],
)
def test_another_method_than_lora_is_the_only_reason(
    config: Any, says: str, model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    with quiet():
        get_peft_model(load_base(model_dir, "causal"), config).save_pretrained(str(tmp_path / "other"))
    (finding,) = findings(tmp_path / "other", expectation)
    assert finding == f"peft_type: expected LORA, got {says}; only LoRA adapters can be served"


@pytest.mark.parametrize("below", ["snapshots/0a1b", "checkpoint-500", "adapter"])
def test_an_adapter_below_the_folder_is_named(below: str, tmp_path: Path, expectation: ExpectedModules) -> None:
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "adapter_config.json").write_text("{}")
    found = findings(tmp_path, expectation)
    assert f"adapter_config.json: expected this file in the folder; the adapter is below, in {below}." in found[0]


def test_the_latest_checkpoint_and_snapshot_are_named(tmp_path: Path) -> None:
    assert adapter_below(tmp_path) is None
    for name in ("checkpoint-90", "checkpoint-500", "runs"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-90", "checkpoint-500"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert adapter_below(tmp_path) == "checkpoint-500"
    for changed_s, name in ((2_000_000_000, "0a"), (1_000_000_000, "ff")):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        (tmp_path / "snapshots" / name / "adapter_config.json").write_text(json.dumps({}))
        os.utime(tmp_path / "snapshots" / name, (changed_s, changed_s))
    assert adapter_below(tmp_path) == "snapshots/0a"


def test_a_base_model_in_the_hubs_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "0a1b").mkdir(parents=True)
    (tmp_path / "snapshots" / "0a1b" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"the model is below, in {tmp_path}/snapshots/0a1b"):
        read_config(tmp_path)
