"""Fixtures of the engine tests: running engines, and the parts that adapter tests need without one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.model.architecture import Architecture, read_architecture, read_config
from ranklet.replicas.model.modules import LORA_MODULES
from tests.assets.adapters import AdapterSpec


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def architecture(model_dir: Path) -> Architecture:
    return read_architecture(read_config(model_dir))


@pytest.fixture(scope="session")
def expectation(model_dir: Path, architecture: Architecture) -> ExpectedModules:
    table = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    return ExpectedModules(architecture, 64, LORA_MODULES, ("model",), table)


@pytest.fixture
def make_pool(architecture: Architecture) -> Callable[[], AdapterPool]:
    """Return a function that makes pools of two slots on the CPU."""
    return lambda: AdapterPool(architecture, 2, 64, LORA_MODULES, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def engine(model_dir: Path) -> Iterator[Engine]:
    """A running engine with more slots than there are adapters."""
    running = Engine(EngineConfig(model_dir, slots=8, max_batch_tokens=4096, max_model_len=1024))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def text_family(families_dir: Path) -> tuple[Path, list[AdapterSpec]]:
    """Return a small Llama whose texts do not repeat one token, as those of `model_dir` do, and its adapters."""
    from tests.assets.families import family_texts

    made = family_texts(families_dir, "llama")
    return made.model, made.adapters


@pytest.fixture
def make_engine(model_dir: Path) -> Iterator[Callable[..., Engine]]:
    """Return a function that makes engines from fields of EngineConfig. The caller starts them."""
    made: list[Engine] = []

    def make(folder: Path = model_dir, listener: Listener | None = None, **fields: Any) -> Engine:
        config = EngineConfig(folder, **{"slots": 2, "max_batch_tokens": 4096, **fields})
        made.append(Engine(config, listener))
        return made[-1]

    yield make
    for each in made:
        each.stop()
