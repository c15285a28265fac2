"""`ranklet adapters verify` reports what a service would refuse, and what it would leave out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranklet.cluster.command.cli import main
from tests.assets.adapters import save_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import SentenceFolder
from tests.assets.token_rows import save_resized_adapter

HIDDEN = 32


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("base") / "model", hidden_size=HIDDEN, intermediate_size=48, layers=1, heads=2,
        kv_heads=1, head_dim=16, vocab_size=600,
    )  # fmt: skip


def verify(base_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    status = main(["adapters", "verify", "--model", str(base_dir), str(folder), *flags])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_files_of_sentence_transformers_are_compared_with_the_bases(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_adapter(base_dir, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base_dir / name).read_bytes())
    SentenceFolder().write(folder, HIDDEN)
    status, said = verify(base_dir, folder, capsys)
    assert (status, "rank 4" in said) == (0, True)
    SentenceFolder(mode="mean", prompt="Q: ").write(folder, HIDDEN)
    status, said = verify(base_dir, folder, capsys)
    assert status == 0
    assert "adapter: note: pooling: 'mean'; the base model has 'last'" in said
    assert "adapter: note: default prompt: 'Q: '; the base model has ''" in said
    SentenceFolder(transformer={"do_lower_case": True}).write(folder, HIDDEN)
    assert "do_lower_case: expected False as the base model has, got True" in verify(base_dir, folder, capsys)[1]
    changed = json.loads((base_dir / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    assert "tokenizer.json: post_processor: expected" in verify(base_dir, folder, capsys)[1]


def test_lora_of_the_head_is_a_note(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(base_dir, tmp_path / "head", r=4, target_modules=["q_proj", "lm_head"])
    status, said = verify(base_dir, folder, capsys)
    assert (status, "head: note: lm_head: embeddings do not use the LoRA of the head" in said) == (0, True)


def test_rows_of_tokens_are_checked_with_the_limits_of_the_service(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = [7, *range(600, 640)]  # the base model has 600 tokens
    folder = save_resized_adapter(base_dir, tmp_path / "resized-tokens", 640, trainable_token_indices=trained)
    status, said = verify(base_dir, folder, capsys, "--token-rows", "48", "--added-tokens", "40")
    assert (status, "on q_proj, 48 rows of tokens" in said) == (0, True)
    status, said = verify(base_dir, folder, capsys, "--token-rows", "47")
    assert status == 0, "whole pages are kept"
    status, said = verify(base_dir, folder, capsys, "--token-rows", "32")
    assert (status, "48 rows differ" in said, "this server keeps 32 (engine.token_rows)" in said) == (1, True, True)
    status, said = verify(base_dir, folder, capsys, "--added-tokens", "39")
    assert (status, "39 more (engine.added_tokens)" in said) == (1, True)


def test_a_git_lfs_pointer_is_named(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(base_dir, tmp_path / "pointer", r=4, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    status, said = verify(base_dir, folder, capsys)
    assert (status, "Git LFS pointer" in said) == (1, True)


def test_a_pickled_adapter_of_pissa_is_converted(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_adapter(base_dir, tmp_path / "pissa", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    status, said = verify(base_dir, source, capsys)
    assert (status, said.count("`ranklet adapters convert`")) == (1, 2)
    target = tmp_path / "served"
    arguments = ["adapters", "convert", str(source), str(target)]
    assert main(arguments) == 1
    assert "ranklet: init_lora_weights: 'pissa' has changed the base's weights" in capsys.readouterr().err
    assert main([*arguments, "--model", str(base_dir)]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    status, said = verify(base_dir, target, capsys)
    assert (status, "rank 8" in said) == (0, True)
