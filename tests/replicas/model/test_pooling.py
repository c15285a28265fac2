"""Pooling equals that of sentence-transformers for every form of its configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.pooling import Pooling, read_pooling
from tests.assets.corpus import TEXTS
from tests.assets.make import make_model
from tests.replicas.asking import ask, prompts

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "last"},
        {"pooling": "mean"},
        {"pooling": "cls"},
        {"pooling": "last", "legacy_pooling": False},
        {"pooling": "mean", "legacy_pooling": False},
        {"pooling": "cls", "legacy_pooling": False, "append_eos": False},
        {"pooling": "mean", "normalize": False},
        {"pooling": "last", "normalize": False, "bos": True},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_vectors_equal_those_of_sentence_transformers(
    options: dict[str, Any], tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    folder = make_model(tmp_path / "model", **SMALL, **options)
    engine = make_engine(folder)
    engine.start()
    texts = [*TEXTS[:5], "x"]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(ask(engine, prompts(folder, texts)).result, theirs, atol=1e-5, rtol=1e-5)


def test_a_folder_without_modules_json_is_pooled_as_qwen3_embedding(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling("last", normalize=True, max_tokens=None)


def write(folder: Path, modules: Any, pooling: Any = None, limits: Any = None) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if limits is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


def test_module_names_of_newer_releases_and_the_token_limit_are_read(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        [
            {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
            {"type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "path": "1_Pooling"},
        ],
        {"pooling_mode": "mean"},
        {"max_seq_length": 77},
    )
    assert read_pooling(folder) == Pooling("mean", normalize=False, max_tokens=77)


TRANSFORMER, POOLING, NORMALIZE = module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize", "2_N")


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([TRANSFORMER, module("Dropout", "2_Dropout")], None, "got also Dropout"),
        (
            [TRANSFORMER, {"type": "mine.Pooling", "path": "1_Pooling"}],
            {"pooling_mode": "mean"},
            "got also mine.Pooling",
        ),
        (
            [TRANSFORMER, NORMALIZE, POOLING],
            {"pooling_mode": "mean"},
            "the order Transformer, Pooling, Dense, Normalize, got",
        ),
        ([TRANSFORMER], None, "the order Transformer, Pooling, Dense, Normalize, got Transformer"),
        ([TRANSFORMER, POOLING, POOLING], {"pooling_mode": "mean"}, "got Transformer, Pooling, Pooling"),
        ([module("Transformer", "0_Transformer"), POOLING], {"pooling_mode": "mean"}, "Transformer: expected the path"),
        ([TRANSFORMER, module("Pooling", "../1_Pooling")], None, "paths within the folder"),
        ([TRANSFORMER, POOLING], {"pooling_mode_max_tokens": True}, "max_tokens"),
        ([TRANSFORMER, POOLING], {"pooling_mode": ["mean", "cls"]}, "mean, cls"),
        (
            [TRANSFORMER, POOLING],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling_mode_mean_tokens",
        ),
        ([TRANSFORMER, POOLING], {"pooling_mode": "weightedmean"}, "weightedmean"),
        ([TRANSFORMER, POOLING], {}, "none"),
        ([TRANSFORMER, POOLING], None, "missing"),
        ([{"type": "sentence_transformers.models.Pooling"}], None, "expected modules with type and path"),
        (["Pooling"], None, "expected modules with type and path"),
    ],
)
def test_unsupported_pooling_is_refused_by_name(tmp_path: Path, modules: Any, pooling: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_pooling(write(tmp_path, modules, pooling))


def test_a_pooling_config_without_modules_is_refused(tmp_path: Path) -> None:
    """A copy that left out modules.json would be pooled otherwise."""
    write(tmp_path, [TRANSFORMER, POOLING], {"pooling_mode": "mean"})
    (tmp_path / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"expected modules\.json beside it"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
@pytest.mark.parametrize("content", ["{", '"text"', ""])
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    folder = write(tmp_path, [module("Transformer"), module("Pooling", "1_Pooling")], {"pooling_mode": "mean"}, {})
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        read_pooling(folder)
