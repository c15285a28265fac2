"""The "auto" device and dtype depend on the machine; named ones do not."""

from pathlib import Path

import pytest
import torch

from ranklet.replicas.config import DTYPES, EngineConfig
from ranklet.replicas.model.device import pick_device, pick_dtype


def test_the_auto_dtype_of_the_cpu_is_float32() -> None:
    config = EngineConfig(Path("m"), device="cpu")
    assert pick_device(config) == torch.device("cpu")
    assert pick_dtype(config) == torch.float32


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "auto"])
def test_a_named_dtype_is_used(name: str) -> None:
    assert str(pick_dtype(EngineConfig(Path("m"), device="cpu", dtype=name))) == f"torch.{name}"


def test_the_auto_device_is_cuda_if_available() -> None:
    expected = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = EngineConfig(Path("m"))
    assert (pick_device(config).type, pick_dtype(config)) == expected


def test_a_device_may_be_named_by_index() -> None:
    assert pick_device(EngineConfig(Path("m"), device="cuda:1")) == torch.device("cuda", 1)
