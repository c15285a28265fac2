"""Fixtures of all tests: the demo model, its adapters, NaN in uninitialised memory. Skips GPU tests without a GPU."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import needs

if TYPE_CHECKING:
    from tests.assets.adapters import AdapterSpec

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, and for each kernel's file
    from tests import interpreter

    interpreter.speed_up()

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "runs_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=needs.reason("a CUDA device", "PyTorch sees none here")))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after pytest's own list of skipped tests
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Print how many tests each missing program or device has skipped."""
    yield
    skipped = (report.longrepr for report in terminalreporter.getreports("skipped"))
    for line in needs.summary(str(each[2]) for each in skipped if isinstance(each, tuple)):
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def runs_ray() -> None:
    """For tests and fixtures that start Ray: it needs the machine to itself, so they have the marker `ray`."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail('tests that start Ray run in one process: deselect them with -m "not ray", or leave --numprocesses')


@pytest.fixture(scope="session")
def assets_dir(pytestconfig: pytest.Config) -> Path:
    """Return a folder with `model/` and `adapters/`. It is kept between runs, so tests must not write into it."""
    from tests.assets.cache import digest, make_once

    return make_once(pytestconfig.cache.mkdir(f"assets-{digest()}"))


@pytest.fixture(scope="session")
def model_dir(assets_dir: Path) -> Path:
    """Return the folder of a small Qwen3 embedding model: 4 layers, hidden 128, tied, last-token pooling."""
    return assets_dir / "model"


@pytest.fixture(scope="session")
def adapters_dir(assets_dir: Path) -> Path:
    return assets_dir / "adapters"


@pytest.fixture(scope="session")
def adapter_specs(adapters_dir: Path) -> "list[AdapterSpec]":
    from tests.assets.adapters import adapter_specs

    return adapter_specs(adapters_dir)


@pytest.fixture(scope="session")
def families_dir(pytestconfig: pytest.Config) -> Path:
    """Return the folder of `family_texts`. It is kept between runs, so tests must not write into it."""
    from tests.assets.cache import digest

    return pytestconfig.cache.mkdir(f"families-{digest()}")


@pytest.fixture(scope="session")
def smollm_dir(pytestconfig: pytest.Config) -> Path:
    """Return the folder of SmolLM2-135M-Instruct. The first test that needs it downloads 93 MB; see `smollm`."""
    from tests.assets import smollm

    try:
        return smollm.make_smollm(pytestconfig.cache.mkdir(f"smollm-{smollm.digest()}"))
    except smollm.DownloadError as error:
        pytest.skip(needs.reason("SmolLM2", str(error)))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill memory of torch.empty with NaN (integers: the largest one), so that reading it too early shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # fill_uninitialized_memory needs it
    yield
    torch.set_deterministic_debug_mode(before)
