"""A pytest plugin for a machine without a GPU: tests compile their kernels for an H200, and launch none.

`python -O -m pytest -p tests.kernels.sm90 --assert=plain` runs tests as if there was a GPU. Tensors stay on the CPU.
Nothing is compared, since no kernel runs: `-O` leaves asserts out. A test fails if a kernel does not compile, or needs
more shared memory than there is. Triton brings the compiler of CUDA.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHARED_BYTES, PROCESSORS = 232_448, 132
_IS_CUDA, _DEVICE = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__  # type: ignore[attr-defined]


class OnCpu(TorchFunctionMode):
    """Tensors say that they are on a GPU, and stay on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_CUDA:
            return True
        if func == _DEVICE:
            return CUDA
        if func == torch.Tensor.cuda:
            return args[0]
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = [_on_cpu(each) for each in args], {key: _on_cpu(each) for key, each in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if (dtype := kwargs.pop("out_dtype", None)) is not None:  # the CPU has no such product
            args = [each.to(dtype) for each in args]
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).startswith("cuda"):
        return CPU
    return value


class Utils:
    """What Triton asks CUDA."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": PROCESSORS, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Return a module, a function, its registers, its spilled bytes, and the most threads of a block."""
        return 1, 1, 0, 0, 1024


class Driver:
    """Stands for Triton's driver of an H200."""

    utils = Utils()

    def __init__(self) -> None:
        self.compiled: set[str] = set()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the function that launches a kernel, here nothing."""
        self.compiled.add(metadata.name)
        return lambda *_: None


def play() -> None:
    triton.runtime.driver.set_active(Driver())
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, name="NVIDIA H200", total_memory=140 << 30)
    played = {
        "is_available": True, "device_count": 1, "get_device_capability": (9, 0), "get_device_name": properties.name,
        "get_device_properties": properties, "is_current_stream_capturing": False, "synchronize": None,
    }  # fmt: skip
    for name, value in played.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.device = lambda *_: nullcontext()  # type: ignore[assignment, misc]
    torch.testing.assert_close = lambda *_, **__: None
    OnCpu().__enter__()  # type: ignore[no-untyped-call]


play()  # before the files of tests are imported, which ask whether there is a GPU


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    compiled = triton.runtime.driver.active.compiled
    terminalreporter.write_line(f"compiled: {', '.join(sorted(compiled))}")
