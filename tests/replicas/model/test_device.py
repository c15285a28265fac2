"""What "auto" means here, and that a named device or dtype is taken at its word."""

from pathlib import Path

import pytest
import torch

from ranklet.replicas.config import DTYPES, EngineConfig
from ranklet.replicas.model.device import pick_device, pick_dtype


def test_auto_on_the_cpu_is_float32() -> None:
    config = EngineConfig(Path("m"), device="cpu")
    assert pick_device(config) == torch.device("cpu")
    assert pick_dtype(config) == torch.float32


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "auto"])
def test_a_named_dtype(name: str) -> None:
    assert str(pick_dtype(EngineConfig(Path("m"), device="cpu", dtype=name))) == f"torch.{name}"


def test_auto_is_cuda_where_there_is_one() -> None:
    expected = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = EngineConfig(Path("m"))
    assert (pick_device(config).type, pick_dtype(config)) == expected


def test_a_device_by_number() -> None:
    assert pick_device(EngineConfig(Path("m"), device="cuda:1")) == torch.device("cuda", 1)
