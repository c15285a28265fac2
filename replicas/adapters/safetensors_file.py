"""Reads the data of a safetensors file, straight into one flat tensor.

Loads run beside the thread that launches batches, and each call into torch may take the GIL from that thread. So names
and shapes come from the header, and neighbouring tensors are read together. `safe_open` would hold the GIL while it
waits for the disk, which may hang.
"""

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ranklet.replicas.adapters.pinned_memory import Allocate
from ranklet.replicas.adapters.safetensors_header import StoredTensor, UnreadableWeightsError, not_whole
from ranklet.replicas.regular_file import open_regular

FLOATS = "float32, bfloat16 or float16"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CONVERTED_NUMBERS = 1 << 22  # numbers that change their dtype at once


def read_tensors(
    path: Path, tensors: Iterable[StoredTensor], dtype: torch.dtype, allocate: Allocate
) -> tuple[Tensor, dict[str, int]]:
    """Read tensors end to end into one flat tensor of `dtype`. Returns it and the offset of each key in it.

    Raises:
        UnreadableWeightsError: the file cannot be read, or has become shorter.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    sizes = [math.prod(tensor.shape) for tensor in ordered]
    flat = allocate(sum(sizes), dtype)
    offsets = dict(zip((tensor.key for tensor in ordered), itertools.accumulate(sizes, initial=0), strict=False))
    try:
        with open_regular(path) as file:
            for run in _runs(ordered):
                numbers = sum(math.prod(tensor.shape) for tensor in run)
                begin = offsets[run[0].key]
                _read_run(file, run[0], flat[begin : begin + numbers])
    except (OSError, EOFError) as error:
        raise UnreadableWeightsError(not_whole(path, error)) from error
    return flat, offsets


def read_tensor(path: Path, tensor: StoredTensor) -> Tensor:
    """Read one tensor in its own dtype, which must be one of `DTYPES`.

    Raises:
        UnreadableWeightsError: the file cannot be read, or has become shorter.
    """
    found = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    try:
        with open_regular(path) as file:
            _read_run(file, tensor, found.view(-1))
    except (OSError, EOFError) as error:
        raise UnreadableWeightsError(not_whole(path, error)) from error
    return found


def _runs(ordered: list[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Yield groups of neighbouring tensors of one dtype."""
    run: list[StoredTensor] = []
    for tensor in ordered:
        if run and (tensor.dtype != run[0].dtype or tensor.start != run[-1].start + run[-1].nbytes):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _read_run(file: io.FileIO, first: StoredTensor, into: Tensor) -> None:
    file.seek(first.start)
    stored_dtype = DTYPES[first.dtype]
    if stored_dtype == into.dtype:
        _fill(file, into)
        return
    for piece in into.split(_CONVERTED_NUMBERS):
        raw = torch.empty(len(piece), dtype=stored_dtype)
        _fill(file, raw)
        piece.copy_(raw)


def _fill(file: io.FileIO, tensor: Tensor) -> None:
    rest = tensor.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError("it ends before its last tensor")
        rest = rest[count:]
