"""Fixtures of the kernel tests."""

import importlib
import sys
from types import ModuleType

import pytest
import torch


def _of_triton(name: str) -> bool:
    return name.split(".")[0] == "triton" and not name.startswith("triton._C")


@pytest.fixture(scope="session")
def interpreted_fused() -> ModuleType:
    """A second copy of `fused.py`, whose kernels Triton interprets on the CPU.

    Triton decides at import, for its own library functions too, so both are imported anew and the first put back.
    """
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_triton(name) or name.endswith(".fused")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            return importlib.import_module("ranklet.kernels.pointwise")
        finally:
            for name in [name for name in sys.modules if _of_triton(name)]:
                del sys.modules[name]
            sys.modules.update(aside)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
