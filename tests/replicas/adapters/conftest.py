"""A base model's tokenizer, and an adapter's folder with a copy of it."""

import shutil
from pathlib import Path

import pytest

from tests.assets.tokenizer import save_tokenizer


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, vocab_size=600, max_length=64)
    return folder


@pytest.fixture(name="folder")
def _folder(base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "adapter"))
