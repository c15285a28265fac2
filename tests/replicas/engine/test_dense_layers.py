"""Dense layers of base models and adapters are mixed in one batch, or refused by name if they cannot be used."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest, ModelError
from ranklet.replicas.model.embedding_settings import read_base_settings, read_embedding_settings
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.adapters import quiet, save_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import HIDDEN, SMALL_MODEL, SentenceFolder
from tests.replicas.asking import PATIENCE_S, ask, ref, submit

TEXTS = ["Notice must be given in writing.", "a", "word " * 30]
BASE = SentenceFolder(
    mode="mean",
    dense=(
        {"out_features": 64, "activation_function": nn.Identity(), "bias": False},
        {"out_features": 24, "activation_function": nn.Identity(), "bias": False},
    ),
)
ADAPTERS = {
    "own": SentenceFolder(dense=({"out_features": 40, "activation_function": nn.ReLU()},)),
    "same": BASE,  # other weights of equal layers
    "sigmoid": SentenceFolder(
        ("Transformer", "Pooling"), dense=({"out_features": 9, "activation_function": nn.Sigmoid()},)
    ),
    "none": SentenceFolder(mode="mean"),
    "silent": None,  # its folder says nothing of modules
}
CONFIG, WEIGHTS = "2_Dense/config.json", "2_Dense/model.safetensors"


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BASE.write(make_model(tmp_path_factory.mktemp("base") / "model", **SMALL_MODEL), HIDDEN)


@pytest.fixture(scope="module", name="folders")
def _folders(base_dir: Path) -> dict[str, Path]:
    folders = {}
    for seed, (name, made) in enumerate(ADAPTERS.items()):
        folders[name] = folder = save_adapter(
            base_dir, base_dir.parent / name, seed=seed, head="bare", r=4, target_modules=["q_proj", "v_proj"]
        )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base_dir / file, folder)
        if made is not None:
            made.write(folder, HIDDEN)
    return folders


@pytest.fixture(scope="module", name="engine")
def _engine(base_dir: Path) -> Iterator[Engine]:
    running = Engine(EngineConfig(base_dir, slots=5, max_batch_tokens=512))
    running.start()
    yield running
    running.stop()


def settings_of(base_dir: Path, adapter: AdapterRef | None) -> dict[str, Any]:
    """Return the parameters that a replica sets as the folder says."""
    found = read_base_settings(base_dir)
    if adapter is not None:
        found = read_embedding_settings(Path(adapter.path), found)
    return {"pooling": found.mode, "normalize": found.normalize, "dense": found.dense}


def theirs(base_dir: Path, folder: Path, dimensions: int | None) -> NDArray[np.float32]:
    if not (folder / "modules.json").is_file():
        completed = Path(shutil.copytree(base_dir, folder.parent / f"{folder.name}-completed", dirs_exist_ok=True))
        (completed / "model.safetensors").unlink()
        (completed / "config.json").unlink()
        folder = Path(shutil.copytree(folder, completed, dirs_exist_ok=True))
    with quiet():
        model = SentenceTransformer(str(folder), device="cpu")
    normalize = "Normalize" in [type(module).__name__ for module in model]
    found: NDArray[np.float32] = model.encode(TEXTS, truncate_dim=dimensions, normalize_embeddings=normalize)
    return found


@pytest.mark.parametrize("dimensions", [None, 7])
def test_models_with_and_without_layers_share_a_batch(
    engine: Engine, base_dir: Path, folders: dict[str, Path], dimensions: int | None
) -> None:
    ids = PromptTokenizer(base_dir).encode(TEXTS)
    models: dict[str, AdapterRef | None] = {"base": None, **{name: ref(folder) for name, folder in folders.items()}}
    for adapter in filter(None, models.values()):
        engine.load(adapter)
    with engine.paused():
        asked = {
            name: submit(engine, ids, adapter, dimensions, **settings_of(base_dir, adapter))
            for name, adapter in models.items()
        }
    found = {name: each.result(PATIENCE_S).result for name, each in asked.items()}
    for name, vectors in found.items():
        expected = theirs(base_dir, folders.get(name, base_dir), dimensions)
        np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=name)
    widths = {"base": 24, "own": 40, "same": 24, "sigmoid": 9, "none": HIDDEN, "silent": 24}
    assert {name: vectors.shape[1] for name, vectors in found.items()} == {
        name: dimensions or width for name, width in widths.items()
    }
    assert np.abs(found["same"] - found["base"]).max() > 0.01


def test_dimensions_are_those_after_the_layers(engine: Engine, base_dir: Path, folders: dict[str, Path]) -> None:
    ids, adapter = PromptTokenizer(base_dir).encode(TEXTS[:1]), ref(folders["own"])
    assert (engine.limits.hidden, engine.limits.width) == (HIDDEN, 24)
    with pytest.raises(InvalidRequest, match="dimensions: expected 1 to 24, got 25"):
        ask(engine, ids, None, 25)
    with pytest.raises(InvalidRequest, match="dimensions: expected 1 to 40, got 41"):
        ask(engine, ids, adapter, 41, **settings_of(base_dir, adapter))


def changed(folder: Path, name: str, **fields: Any) -> None:
    config = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(config))


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: changed(folder, CONFIG, in_features=31), f"{CONFIG}: in_features: expected 32, .* got 31"),
        (
            lambda folder: changed(folder, CONFIG, out_features=39),
            "linear.weight: expected the shape",
        ),
        (lambda folder: changed(folder, CONFIG, out_features=1 << 20), f"{CONFIG}: out_features: expected 1 to 16384"),
        (lambda folder: changed(folder, CONFIG, out_features=True), f"{CONFIG}: out_features: expected 1 to 16384"),
        (lambda folder: changed(folder, CONFIG, in_features=16384, out_features=16384), "at most 67108864 bytes"),
        (lambda folder: changed(folder, CONFIG, activation_function="torch.nn.Mish"), "activation_function: .*Mish"),
        (lambda folder: changed(folder, CONFIG, activation_function="mine.Tanh"), "activation_function: .*mine.Tanh"),
        (lambda folder: changed(folder, CONFIG, activation_function=None), "activation_function: .*None"),
        (lambda folder: changed(folder, CONFIG, bias="no"), f"{CONFIG}: bias: expected True or False"),
        (lambda folder: changed(folder, CONFIG, scale=3), f"{CONFIG}: scale: not supported"),
        (lambda folder: changed(folder, CONFIG, bias=False), "expected the tensors linear.weight, got linear.bias"),
        (lambda folder: changed(folder, CONFIG, module_input_name="token_embeddings"), "module_input_name: expected"),
        (lambda folder: stored(folder, {"linear.bias": torch.full((40,), torch.nan)}), "2_Dense/linear.bias: .*finite"),
        (
            lambda folder: stored(folder, {"linear.bias": torch.ones(40, dtype=torch.int8)}),
            "2_Dense/.*: expected float",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: expected the weights"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), f"{WEIGHTS}: expected a whole safetensors file"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "2_Dense/pytorch_model.bin"), "pickle is never read"),
        (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: expected the Dense layer"),
    ],
)
def test_layers_that_cannot_be_used_are_refused_by_name(
    engine: Engine, folders: dict[str, Path], tmp_path: Path, change: Any, says: str
) -> None:
    folder = Path(shutil.copytree(folders["own"], tmp_path / "changed"))
    change(folder)
    with pytest.raises(InvalidAdapter, match=says):
        engine.load(ref(folder, tmp_path.name))  # a name of its own, since refusals are kept


def test_more_layers_than_a_folder_may_have(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["own"], tmp_path / "changed"))
    SentenceFolder(dense=({"out_features": HIDDEN},) * 5).write(folder, HIDDEN)
    with pytest.raises(ModelError, match=r"modules\.json: expected at most 4 Dense layers, got 5"):
        read_embedding_settings(folder)


def test_a_base_model_with_layers_that_cannot_be_used(base_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_dir, tmp_path / "changed"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"{folder}: {WEIGHTS}: expected the weights"):
        Engine(EngineConfig(folder, slots=2, max_batch_tokens=512))


def test_vectors_that_overflow_fail_their_request(
    engine: Engine, base_dir: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["own"], tmp_path / "changed"))
    stored(folder, {"linear.weight": torch.full((40, HIDDEN), 3e38)})
    adapter, ids = ref(folder), PromptTokenizer(base_dir).encode(TEXTS)
    with pytest.raises(InvalidAdapter, match="Dense layers for these prompts is not finite"):
        ask(engine, ids, adapter, **settings_of(base_dir, adapter))
    assert ask(engine, ids).result.shape == (3, 24)
