"""Fixtures of the suite: a model folder and its adapters made once, NaN in uninitialised memory, GPU tests skipped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.assets.make import AdapterSpec

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel's file is imported

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where PyTorch sees no CUDA device."""
    for item in items:
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none here"))


@pytest.fixture(scope="session")
def assets_dir(pytestconfig: pytest.Config) -> Path:
    """A folder with `model/` and `adapters/`, kept between runs until what makes it changes. Do not write into it."""
    from tests.assets.cache import digest, make_once

    return make_once(pytestconfig.cache.mkdir(f"assets-{digest()}"))


@pytest.fixture(scope="session")
def model_dir(assets_dir: Path) -> Path:
    """A small Qwen3 embedding model: 4 layers, hidden 128, tied, last-token pooling."""
    return assets_dir / "model"


@pytest.fixture(scope="session")
def adapters_dir(assets_dir: Path) -> Path:
    """The folder that holds the six adapters, one folder each."""
    return assets_dir / "adapters"


@pytest.fixture(scope="session")
def adapter_specs(adapters_dir: Path) -> "list[AdapterSpec]":
    """The six adapters of the demo, saved by PEFT."""
    from tests.assets.make import adapter_specs

    return adapter_specs(adapters_dir)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers): what is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory, on by default, needs it
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
