"""Reads the tensors of a base model, in one safetensors file or several, onto the device."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.folder import read_json
from ranklet.replicas.model.git_lfs import pointer_problem

# Tensors that may stay unread: the language-model head, and buffers of old checkpoints.
_IGNORED = ("lm_head.weight", "rotary_emb.inv_freq")

PADDED_ROWS = 64  # cuBLAS multiplies by a matrix of 151,669 rows six times slower than by one of 151,680


class Checkpoint:
    """The tensors of a model folder. Names lack the `model.` prefix of causal-LM checkpoints."""

    def __init__(self, model_dir: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._dir = model_dir
        self._device = device
        self._dtype = dtype
        self._open_files = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        self._unread: set[str] = set()

    def __enter__(self) -> Self:
        for path in self._shards():
            try:
                file = self._open_files.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                problem = pointer_problem(path) or f"{path.name}: expected a safetensors file, got: {error}"
                raise ModelError(f"{self._dir}: {problem}") from error
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                self._files[key.removeprefix("model.")] = (file, key)
        self._unread = {key for key in self._files if not key.endswith(_IGNORED)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def _shards(self) -> list[Path]:
        index = self._dir / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = set(read_json(index, dict)["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index}: expected a weight_map of tensors to files, got: {error!r}") from error
            return [self._dir / name for name in sorted(names)]
        single = self._dir / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{self._dir}: expected model.safetensors or model.safetensors.index.json, got neither")
        return [single]

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor.

        Raises:
            ModelError: the tensor is missing or has another shape.
        """
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._copy(name, out)
        return out

    def read_padded(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Read a matrix into the first rows of one with a multiple of `PADDED_ROWS` rows; the others are zero.

        Raises:
            ModelError: the tensor is missing or has another shape.
        """
        rows = -(-shape[0] // PADDED_ROWS) * PADDED_ROWS
        out = torch.empty((rows, shape[1]), dtype=self._dtype, device=self._device)
        self._copy(name, out[: shape[0]])
        out[shape[0] :] = 0
        return out

    def read_packed(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Read several linear modules as one packed module.

        Args:
            names: the modules, without `.weight`.
            shapes: [N, K] of each module.

        Returns:
            The weight [sum of N, K] and the bias [sum of N], which is None if no module has one.

        Raises:
            ModelError: a tensor is missing or has another shape.
        """
        rows = [shape[0] for shape in shapes]
        weight = torch.empty((sum(rows), shapes[0][1]), dtype=self._dtype, device=self._device)
        bias = None
        if any(f"{name}.bias" in self._files for name in names):
            bias = torch.zeros(sum(rows), dtype=self._dtype, device=self._device)
        start = 0
        for name, count in zip(names, rows, strict=True):
            self._copy(f"{name}.weight", weight[start : start + count])
            if bias is not None and f"{name}.bias" in self._files:
                self._copy(f"{name}.bias", bias[start : start + count])
            start += count
        return weight, bias

    def _copy(self, name: str, out: Tensor) -> None:
        if name not in self._files:
            raise ModelError(f"{self._dir}: expected a tensor {name}, but the checkpoint has none")
        file, key = self._files[name]
        tensor = file.get_tensor(key)
        if tuple(tensor.shape) != tuple(out.shape):
            raise ModelError(f"{self._dir}: {key}: expected shape {list(out.shape)}, got {list(tensor.shape)}")
        out.copy_(tensor)
        self._unread.discard(name)

    def check_all_read(self) -> None:
        """Check that every tensor was read. A model with further tensors would compute other states than ranklet.

        Raises:
            ModelError: tensors were not read; the message names up to five.
        """
        if self._unread:
            some = ", ".join(sorted(self._unread)[:5])
            raise ModelError(f"{self._dir}: {len(self._unread)} tensors that this architecture does not use: {some}")
