"""A head computes the logits of transformers; a model without one says why it cannot generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.decoder import Decoder
from ranklet.replicas.model.lm_head import LmHead, MissingHead
from tests.assets.causal import states_and_logits
from tests.assets.make import LLAMA3_ROPE, make_model

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 500, "pooling": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2-with-biases": {"architecture": "qwen2"},
    "llama": {"architecture": "llama", "rope": LLAMA3_ROPE},
    "mistral": {"architecture": "mistral", "config": {"sliding_window": 5}},
}
IDS = [7, 300, 4, 4, 250, 11, 90, 2]


def make(folder: Path, **fields: Any) -> Path:
    return make_model(folder, **{**SMALL, **fields})


def read(folder: Path) -> Decoder:
    config = read_config(folder)
    return Decoder(read_architecture(config), config, folder, 64, torch.device("cpu"), torch.float32)


def change(folder: Path, **tensors: torch.Tensor) -> Path:
    """Add tensors to the checkpoint; `lm_head` stands for `lm_head.weight`."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{f"{name}.weight": tensor for name, tensor in tensors.items()}}, path)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tied=tied, **FAMILIES[family])
    model = read(folder)
    assert isinstance(model.lm_head, LmHead)
    assert model.lm_head.ties == tied
    assert (model.lm_head.weight is model.embedding) == tied, "a tied head takes no memory"
    states, wanted = states_and_logits(folder, None, IDS)
    found = model.lm_head.logits(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padded_ids_keep_the_logits_of_the_model(tied: bool, tmp_path: Path) -> None:
    """The vocabulary has more ids than the tokenizer."""
    folder = make(tmp_path / "model", tied=tied, vocab_size=2048)
    head = read(folder).lm_head
    assert isinstance(head, LmHead)
    states, wanted = states_and_logits(folder, None, IDS)
    assert wanted.shape[1] == 2048
    torch.testing.assert_close(head.logits(states), wanted, rtol=0, atol=1e-5)


def test_a_causal_model_without_a_head_computes_embeddings_only(tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B: untied, and saved without a head."""
    folder = make(tmp_path / "model", tied=False)
    path = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != "lm_head.weight"}, path)
    head = read(folder).lm_head
    assert isinstance(head, MissingHead)
    assert "no lm_head.weight, and tie_word_embeddings is false" in head.reason


def test_a_bare_model_has_no_head_and_reads_none(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tied=False, causal_lm=False)
    for model_dir in (folder, change(folder, lm_head=torch.ones(500, 48))):
        head = read(model_dir).lm_head
        assert isinstance(head, MissingHead)
        assert "got Qwen3Model" in head.reason


def test_a_tied_checkpoint_with_two_different_tensors_is_not_tied(tmp_path: Path) -> None:
    """As transformers 5 loads it."""
    folder = make(tmp_path / "model")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    model = read(change(folder, lm_head=embedding.clone()))
    assert isinstance(model.lm_head, LmHead)
    assert model.lm_head.weight is model.embedding
    head = read(change(folder, lm_head=embedding + 1)).lm_head
    assert isinstance(head, LmHead)
    states, wanted = states_and_logits(folder, None, IDS)
    torch.testing.assert_close(head.logits(states), wanted, rtol=0, atol=1e-4)
    assert torch.equal(head.weight, embedding + 1)


def test_heads_of_another_form_are_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tied=False)
    path = folder / "model.safetensors"
    sound = load_file(path)
    save_file({**sound, "lm_head.bias": torch.zeros(500)}, path)
    with pytest.raises(ModelError, match=r"does not use: lm_head\.bias"):
        read(folder)
    save_file({**sound, "lm_head.weight": torch.zeros(501, 48)}, path)
    with pytest.raises(ModelError, match=r"lm_head\.weight: expected shape \[500, 48\], got \[501, 48\]"):
        read(folder)
