"""Checkpoints are read whole, sharded, with or without a prefix; wrong tensors are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.checkpoint import Checkpoint
from tests.assets.make import make_model

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(folder, CPU, dtype)


def save(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def small_tensors() -> Tensors:
    return {
        "model.norm.weight": torch.arange(4.0),
        "model.layers.0.q.weight": torch.ones(2, 4),
        "model.layers.0.k.weight": torch.full((3, 4), 2.0),
        "model.layers.0.k.bias": torch.full((3,), 5.0),
        "lm_head.weight": torch.zeros(9, 4),
    }


def test_modules_are_packed_in_order_with_zeros_for_missing_biases(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path, small_tensors())) as checkpoint:
        weight, bias = checkpoint.read_packed(["layers.0.q", "layers.0.k"], [(2, 4), (3, 4)])
        assert torch.equal(checkpoint.read("norm.weight", (4,)), torch.arange(4.0))
        checkpoint.check_all_read()
    assert torch.equal(weight, torch.cat([torch.ones(2, 4), torch.full((3, 4), 2.0)]))
    assert bias is not None
    assert torch.equal(bias, torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0]))


def test_sharded_and_bare_checkpoints_give_the_same_tensors(tmp_path: Path, model_dir: Path) -> None:
    sharded = make_model(tmp_path / "sharded", max_shard_size="200KB")
    bare = make_model(tmp_path / "bare", causal_lm=False)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    reference = load_file(model_dir / "model.safetensors")
    for folder in (sharded, bare):
        with open_checkpoint(folder) as checkpoint:
            for key, tensor in reference.items():
                assert torch.equal(checkpoint.read(key.removeprefix("model."), tuple(tensor.shape)), tensor)
            checkpoint.check_all_read()


def test_weights_are_rounded_to_the_served_dtype(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.randn(8)}
    with open_checkpoint(save(tmp_path, tensors), torch.bfloat16) as checkpoint:
        assert torch.equal(checkpoint.read("norm.weight", (8,)), tensors["norm.weight"].bfloat16())


def test_missing_misshapen_and_unread_tensors_are_refused_by_name(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path, small_tensors())) as checkpoint:
        with pytest.raises(ModelError, match=r"layers\.9\.q\.weight"):
            checkpoint.read_packed(["layers.9.q"], [(2, 4)])
        with pytest.raises(ModelError, match=r"model\.norm\.weight: expected shape \[5\], got \[4\]"):
            checkpoint.read("norm.weight", (5,))
        with pytest.raises(ModelError, match=r"layers\.0\.k\.bias"):
            checkpoint.check_all_read()


def test_language_model_heads_and_old_rotary_buffers_may_stay_unread(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": torch.zeros(3, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    with open_checkpoint(save(tmp_path, tensors)) as checkpoint:
        checkpoint.check_all_read()


def test_missing_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    def enter(folder: Path) -> None:
        with open_checkpoint(folder):
            pass

    with pytest.raises(ModelError, match=r"model\.safetensors"):
        enter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="expected a safetensors file"):
        enter(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        enter(tmp_path)
    for content in ("{", "{}", "[]", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(ModelError, match=r"index\.json"):
            enter(tmp_path)
