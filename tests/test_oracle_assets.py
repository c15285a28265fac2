"""The oracle agrees with sentence-transformers, and the assets differ enough to reveal a mix-up."""

from pathlib import Path

import numpy as np
import pytest

from tests.assets.adapters import AdapterSpec, save_adapter
from tests.assets.corpus import TEXTS
from tests.assets.make import make_model
from tests.assets.oracle import cosine, encode, reference_embedding


def test_oracle_agrees_with_sentence_transformers(model_dir: Path) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(model_dir), device="cpu").encode(list(TEXTS[:6]))
    np.testing.assert_allclose(reference_embedding(model_dir, None, TEXTS[:6]), theirs, atol=2e-6)


def test_every_adapter_changes_every_text(model_dir: Path, adapter_specs: list[AdapterSpec]) -> None:
    base = reference_embedding(model_dir, None, TEXTS[:4])
    tuned = {spec.name: reference_embedding(model_dir, spec.path, TEXTS[:4]) for spec in adapter_specs}
    seen = [base, *tuned.values()]
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert max(cosine(a, b) for a, b in zip(one, other, strict=True)) < 0.9


def test_texts_get_different_vectors(model_dir: Path) -> None:
    vectors = reference_embedding(model_dir, None, TEXTS)
    similarity = vectors @ vectors.T - 2 * np.eye(len(TEXTS))
    assert similarity.max() < 0.95


def test_the_tokenizer_appends_eos_and_not_the_chat_eos(model_dir: Path) -> None:
    ids = encode(model_dir, "A short text.")
    assert ids[-1] == 0
    assert encode(model_dir, "") == [0]


def test_oracle_rejects_keys_that_peft_ignores(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_adapter(model_dir, tmp_path / "odd", r=4, target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(key for key in weights if "layers.0." in key)
    weights[first.replace("layers.0.", "layers.9.")] = weights.pop(first)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="left unused"):
        reference_embedding(model_dir, folder, ["a"])


def test_equal_arguments_give_equal_bytes(model_dir: Path, tmp_path: Path) -> None:
    again = make_model(tmp_path / "model")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (model_dir / name).read_bytes()
