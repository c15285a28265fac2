"""Prompts of the engine tests and their reference vectors."""

from pathlib import Path

import pytest

from tests.assets.adapters import AdapterSpec
from tests.assets.corpus import TEXTS
from tests.assets.oracle import reference_embedding
from tests.replicas.asking import prompts
from tests.replicas.engine.recording import Expected, Prompts


@pytest.fixture(scope="module")
def expected(model_dir: Path, adapter_specs: list[AdapterSpec]) -> Expected:
    """Reference vectors of TEXTS[:8] by adapter; None is the base model."""
    folders: dict[str | None, Path | None] = {None: None, **{spec.name: spec.path for spec in adapter_specs}}
    return {name: reference_embedding(model_dir, folder, TEXTS[:8]) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tokens(model_dir: Path) -> Prompts:
    return prompts(model_dir, TEXTS[:8])
