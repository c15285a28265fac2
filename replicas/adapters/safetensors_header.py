"""Reads the header of a safetensors file, with the checks of safetensors. Imports no torch."""

import io
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranklet.replicas.adapters.findings import shorten
from ranklet.replicas.adapters.limits import MAX_HEADER_BYTES, MAX_TENSORS
from ranklet.replicas.model.git_lfs import pointer_problem
from ranklet.replicas.regular_file import open_regular

_NAMES_BY_BYTES = {
    1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
    2: "I16 U16 F16 BF16",
    4: "I32 U32 F32",
    8: "I64 U64 F64 C64",
}
_DTYPE_BYTES = {dtype: nbytes for nbytes, dtypes in _NAMES_BY_BYTES.items() for dtype in dtypes.split()}
_METADATA = "__metadata__"
_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 63


class UnreadableWeightsError(Exception):
    """The file cannot be read; the message is the finding."""


class CutShortError(UnreadableWeightsError):
    """The file ends before its header says, like one that is being copied."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file. `start` is its offset in the file, in bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self, first: int, stop: int) -> "StoredTensor":
        """Return some rows of a matrix, as a tensor of the file."""
        row_bytes = self.nbytes // self.shape[0]
        count = min(stop, self.shape[0]) - first
        shape, start = (count, *self.shape[1:]), self.start + first * row_bytes
        return replace(self, shape=shape, start=start, nbytes=count * row_bytes)


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a file, in the file's order.

    Raises:
        CutShortError: the file ends too early.
        UnreadableWeightsError: otherwise not a whole safetensors file, or one beyond the limits of this module.
    """
    problem = pointer_problem(path)
    if problem is not None:
        raise UnreadableWeightsError(problem)
    try:
        with open_regular(path) as file:
            start, fields = _read_fields(path, file)
            data_bytes = os.fstat(file.fileno()).st_size - start
    except EOFError as error:
        raise CutShortError(not_whole(path, error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableWeightsError(not_whole(path, error)) from error
    if len(fields) > MAX_TENSORS:
        raise UnreadableWeightsError(f"{path.name}: expected at most {MAX_TENSORS} tensors, got {len(fields)}")
    stored = [_stored(path, key, value, start) for key, value in fields.items() if key != _METADATA]
    stored.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = start
    for tensor in stored:
        if tensor.start != end:
            raise UnreadableWeightsError(not_whole(path, f"{tensor.key}: its data does not begin where others end"))
        end += tensor.nbytes
    if end != start + data_bytes:
        kind = CutShortError if end > start + data_bytes else UnreadableWeightsError
        raise kind(not_whole(path, f"{data_bytes} bytes of data for {end - start}"))
    return stored


def _read_fields(path: Path, file: io.FileIO) -> tuple[int, dict[str, Any]]:
    """Return the offset of the data, and the header."""
    size = int.from_bytes(_read_exactly(file, 8), "little")
    if size > os.fstat(file.fileno()).st_size - 8:
        raise EOFError("its header ends after the file")
    if size > MAX_HEADER_BYTES:
        raise UnreadableWeightsError(f"{path.name}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {size}")
    content = _read_exactly(file, size)
    if content.count(b"{") > MAX_TENSORS + 2:  # each tensor is an object; so are the header and its metadata
        raise UnreadableWeightsError(f"{path.name}: expected at most {MAX_TENSORS} tensors, got more")
    if not content.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    return 8 + size, dict(json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeated))


def _without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("its header has a name twice")
    return fields


def _read_exactly(file: io.FileIO, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        chunk = file.read(count - len(content))
        if not chunk:
            raise EOFError("it ends within its header")
        content += chunk
    return bytes(content)


def _stored(path: Path, key: str, fields: Any, start: int) -> StoredTensor:
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
    sound = isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2
    if not sound:
        raise UnreadableWeightsError(not_whole(path, f"{shorten(key)}: no dtype, shape and data_offsets"))
    if dtype not in _DTYPE_BYTES:
        raise UnreadableWeightsError(f"{shorten(key)}: expected float32, bfloat16 or float16, got {shorten(dtype)}")
    nbytes = math.prod(shape) * _DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise UnreadableWeightsError(not_whole(path, f"{shorten(key)}: its shape does not fit its data"))
    return StoredTensor(key, dtype, tuple(shape), start + offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < _MAX_SIZE for each in value)
    )


def not_whole(path: Path, error: Exception | str) -> str:
    return f"{path.name}: expected a whole safetensors file, got: {shorten(str(error))}"
