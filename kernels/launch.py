"""Functions that several kernels and launchers share."""

from collections.abc import Callable, Hashable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ranklet.kernels.stack import LinearStack

_fitting: dict[Hashable, int] = {}  # stages by variant, where not all fit


@triton.jit
def slice_of(
    program, SLICES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Returns the slice that a program works on, its first column, its width, and the index of the column block.
    PROGRAMS0: tl.constexpr = (W0 + BLOCK - 1) // BLOCK
    PROGRAMS1: tl.constexpr = (W1 + BLOCK - 1) // BLOCK
    piece = 0
    first = 0
    width = W0
    if SLICES > 1 and program >= PROGRAMS0:
        piece = 1
        first = W0
        width = W1
        program -= PROGRAMS0
        if SLICES > 2 and program >= PROGRAMS1:
            piece = 2
            first = W0 + W1
            width = W2
            program -= PROGRAMS1
    return piece, first, width, program


def programs_of(stack: LinearStack, block: int) -> int:
    """Return the number of programs that cover a projection's output, each with `block` columns of one slice."""
    return sum(triton.cdiv(width, block) for width in stack.widths)


def widths_of(stack: LinearStack) -> dict[str, int]:
    w0, w1, w2 = (*stack.widths, 0, 0)[:3]
    return {"SLICES": len(stack.widths), "W0": w0, "W1": w1, "W2": w2}


def precision_of(x: Tensor) -> str:
    # By default Triton multiplies float32 as TF32, which changes an adapter's vectors by 3e-4.
    return "ieee" if x.dtype == torch.float32 else "tf32"


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the device has TMA and programmatic dependent launch: Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def processors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_fitted(launch: Callable[[int], object], stages: int, variant: Hashable) -> None:
    """Call `launch` with as many pipeline stages, up to `stages`, as fit into the device's shared memory.

    Triton lets parts of a kernel share memory, so only a compiled kernel shows how much it needs.

    Args:
        variant: what that depends on: the kernel, its tile and its specialization.
    """
    for fitting in range(_fitting.get(variant, stages), 1, -1):
        try:
            launch(fitting)
        except OutOfResources:
            _fitting[variant] = fitting - 1
        else:
            return
    launch(1)
