"""Reads a safetensors file: its header with safetensors' own checks, its data straight into one flat tensor.

Loads run beside the thread that launches batches, and each call into torch may take the GIL from that thread. So names
and shapes come from the header, and neighbouring tensors are read together.
"""

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranklet.replicas.adapters.findings import shorten
from ranklet.replicas.adapters.pinned_memory import Allocate
from ranklet.replicas.model.git_lfs import pointer_problem

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536  # more than twenty times a model of 200 layers with all modules targeted
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES_BY_BYTES = {
    1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
    2: "I16 U16 F16 BF16",
    4: "I32 U32 F32",
    8: "I64 U64 F64 C64",
}
_DTYPE_BYTES = {dtype: nbytes for nbytes, dtypes in _NAMES_BY_BYTES.items() for dtype in dtypes.split()}
_CONVERTED_NUMBERS = 1 << 22  # numbers that change their dtype at once
_READ_BYTES = 1 << 20


class UnreadableWeightsError(Exception):
    """The file cannot be read; the message is the finding."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file. `start` is its offset in the file, in bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a file, in the file's order.

    Raises:
        UnreadableWeightsError: not a whole safetensors file, or one beyond the limits of this module.
    """
    problem = pointer_problem(path)
    if problem is not None:
        raise UnreadableWeightsError(problem)
    try:
        start = _check_header(path)
        stored = []
        with safe_open(path, framework="np") as file:
            for key in file.offset_keys():
                tensor = file.get_slice(key)
                stored.append(_stored(key, tensor.get_dtype(), tuple(tensor.get_shape()), start))
                start += stored[-1].nbytes
    except (OSError, SafetensorError, ValueError) as error:
        raise UnreadableWeightsError(_not_whole(path, error)) from error
    return stored


def _stored(key: str, dtype: str, shape: tuple[int, ...], start: int) -> StoredTensor:
    if dtype not in _DTYPE_BYTES:
        raise UnreadableWeightsError(f"{shorten(key)}: expected float32, bfloat16 or float16, got {dtype}")
    return StoredTensor(key, dtype, shape, start, math.prod(shape) * _DTYPE_BYTES[dtype])


def _check_header(path: Path) -> int:
    """Check the header's limits before it is parsed. Returns the data's offset in the file, in bytes.

    Reading it here also brings it into the page cache: `safe_open` holds the GIL while it reads.
    """
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES and size <= path.stat().st_size - 8:
            raise UnreadableWeightsError(
                f"{path.name}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {size}"
            )
        braces, rest = 0, min(size, MAX_HEADER_BYTES)
        while chunk := file.read(min(rest, _READ_BYTES)):
            braces += chunk.count(b"{")
            rest -= len(chunk)
    if braces > MAX_TENSORS + 2:  # each tensor is an object; so are the header and its metadata
        raise UnreadableWeightsError(f"{path.name}: expected at most {MAX_TENSORS} tensors, got about {braces - 1}")
    return 8 + size


def _not_whole(path: Path, error: Exception) -> str:
    return f"{path.name}: expected a whole safetensors file, got: {shorten(str(error))}"


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
        with path.open("rb", buffering=0) as file:
            for run in _runs(ordered):
                numbers = sum(math.prod(tensor.shape) for tensor in run)
                begin = offsets[run[0].key]
                _read_run(file, run[0], flat[begin : begin + numbers])
    except (OSError, EOFError) as error:
        raise UnreadableWeightsError(_not_whole(path, error)) from error
    return flat, offsets


def read_tensor(path: Path, tensor: StoredTensor) -> Tensor:
    """Read one tensor in its own dtype, which must be one of `DTYPES`.

    Raises:
        UnreadableWeightsError: the file cannot be read, or has become shorter.
    """
    found = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    try:
        with path.open("rb", buffering=0) as file:
            _read_run(file, tensor, found.view(-1))
    except (OSError, EOFError) as error:
        raise UnreadableWeightsError(_not_whole(path, error)) from error
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
