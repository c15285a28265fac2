"""A conversion copies the files that belong to an adapter beside its weights, and none from elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranklet.replicas.conversion.convert import Conversion
from ranklet.replicas.conversion.stored_weights import ConversionError
from ranklet.replicas.model.embedding_settings import read_base_settings, read_embedding_settings
from tests.assets.adapters import save_adapter
from tests.assets.sentence_folders import SentenceFolder

HIDDEN = 128  # of the model
DENSE = "2_Dense/model.safetensors"


@pytest.fixture(name="source")
def _source(model_dir: Path, tmp_path: Path) -> Path:
    return save_adapter(model_dir, tmp_path / "source", r=4, target_modules=["q_proj"])


@pytest.fixture(name="dense")
def _dense(model_dir: Path, source: Path) -> Path:
    """The adapter's folder, with a Dense layer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, source)
    SentenceFolder(dense=({"out_features": 24},)).write(source, HIDDEN)
    return source


def test_the_files_of_modules_are_copied(model_dir: Path, dense: Path, tmp_path: Path) -> None:
    target, base = tmp_path / "target", read_base_settings(model_dir)
    Conversion(dense, target).run()
    found = read_embedding_settings(target, base)
    assert found == read_embedding_settings(dense, base)
    assert found.dense
    assert (target / DENSE).read_bytes() == (dense / DENSE).read_bytes()


def test_pickled_weights_of_dense_layers_are_converted(dense: Path, tmp_path: Path) -> None:
    weights = load_file(dense / DENSE)
    torch.save(weights, dense / "2_Dense/pytorch_model.bin")
    (dense / DENSE).unlink()
    notes = Conversion(dense, tmp_path / "target").run()
    assert notes == [f"the weights of a Dense layer are in {DENSE} now"]
    converted = load_file(tmp_path / "target" / DENSE)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    assert not list(tmp_path.glob("target/**/*.bin"))


def test_a_link_out_of_the_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    (source / "README.md").unlink(missing_ok=True)
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ConversionError, match="a link that leaves"):
        Conversion(source, tmp_path / "target").run()
    assert {each.name for each in tmp_path.iterdir()} == {"source", "secret"}
