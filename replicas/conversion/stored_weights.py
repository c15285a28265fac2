"""Reads an adapter's weights from any of the files that training tools write."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ranklet.replicas.adapters.findings import shorten
from ranklet.replicas.adapters.limits import MAX_ADAPTER_BYTES, MAX_CONFIG_BYTES
from ranklet.replicas.regular_file import open_regular, read_regular

_WHOLE = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = ".index.json"
_SHARDS = "adapter_model-*-of-*"
_WRAPPERS = ("state_dict", "module", "model")  # training tools put the tensors under one of these keys
_MEGATRON = ("mp_rank_*", "iter_*/", "latest_checkpointed_iteration.txt", "common.pt", "weights/common.pt", "*.nemo")
MERGES_MEGATRON = (
    "export it with Megatron-Bridge's `examples/conversion/adapter/export_adapter.py`, ms-swift's `megatron export "
    "--to_hf true`, or NeMo's `llm.export_ckpt` with the target `hf-peft`"
)
_TRAINING = (  # files of distributed training, and the command that makes one file of them
    ("zero_to_fp32.py", "ZeRO's parts: run `python zero_to_fp32.py . OUT` in it"),
    ("*_optim_states.pt", "ZeRO's parts: run DeepSpeed's `zero_to_fp32.py . OUT` in it"),
    ("global_step*", "ZeRO's parts: run DeepSpeed's `zero_to_fp32.py . OUT` in it"),
    *((name, f"a checkpoint of Megatron: {MERGES_MEGATRON}") for name in _MEGATRON),
    ("*.distcp", "FSDP's parts: run `accelerate merge-weights`"),
    ("pytorch_model_fsdp*", "FSDP's parts: run `accelerate merge-weights`"),
)


class ConversionError(ValueError):
    """A folder cannot be converted. The message says why, and what to do."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors.

    Raises:
        ConversionError: there are no weights, or not all of them.
        OSError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        for name, tensor in (read_pickled if path.suffix == ".bin" else _read_safetensors)(path).items():
            if name in tensors:
                raise ConversionError(f"{path.name}: {shorten(name)} is in another file too")
            tensors[name] = tensor
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise ConversionError(
            f"{shorten(empty[0])}: expected numbers, got an empty tensor: ZeRO 3 saved the weights without gathering "
            "them. Save them with `stage3_gather_16bit_weights_on_model_save`, or run DeepSpeed's zero_to_fp32.py"
        )
    return tensors


def _files(folder: Path) -> list[Path]:
    for name in _WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in _WHOLE:
        if (index := folder / (name + _INDEX)).is_file():
            return list(_listed(index))
        shards = sorted(folder.glob(_SHARDS + Path(name).suffix))
        if shards:
            return list(_all_of(shards))
    for pattern, remedy in _TRAINING:
        if any(folder.glob(pattern)):
            raise ConversionError(f"{folder}: expected an adapter's weights, got {remedy}, then convert its result")
    raise ConversionError(f"{folder}: expected {' or '.join(_WHOLE)}, whole or in parts; found neither")


def _listed(index: Path) -> Iterator[Path]:
    """Yield the files that an index names. They are beside it."""
    try:
        names = sorted(set(json.loads(read_regular(index, MAX_CONFIG_BYTES))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConversionError(f"{index.name}: expected a weight_map of tensors to files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConversionError(f"{index.name}: expected names of files beside it, got {shorten(repr(name))}")
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index.name}: {shorten(name)} is missing; copy all parts of the adapter")
        yield index.parent / name


def _all_of(shards: list[Path]) -> Iterator[Path]:
    """Yield the parts of a file, whose names are `...-00001-of-00002...`."""
    last = shards[-1].stem.rpartition("-of-")[2]
    if not last.isdecimal() or len(shards) != int(last):
        raise ConversionError(f"{shards[-1].name}: expected {last} parts, got {len(shards)}; copy all of them")
    yield from shards


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_size(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path.name}: expected a safetensors file, got: {shorten(str(error))}") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read a pickled file as tensors only: nothing in it is executed. Raises ConversionError."""
    _check_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any, since the file may contain anything
        reason = shorten(str(error).partition("\n")[0])
        raise ConversionError(
            f"{path.name}: expected tensors only, since nothing in it is executed; got: {reason}"
        ) from None
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict):  # Megatron's modules have such an entry, mostly without a value
        content = {name: value for name, value in content.items() if not str(name).endswith("._extra_state")}
    if not isinstance(content, dict) or not all(isinstance(each, Tensor) for each in content.values()):
        raise ConversionError(f"{path.name}: expected tensors by name, got {type(content).__name__} of other values")
    size = sum(tensor.nbytes for tensor in content.values())  # a view may be larger than what the file stores
    if size > MAX_ADAPTER_BYTES:
        raise ConversionError(f"{path.name}: expected tensors of at most {MAX_ADAPTER_BYTES} bytes, got {size}")
    return {str(name): tensor.contiguous() for name, tensor in content.items()}


def _check_size(path: Path) -> None:
    with open_regular(path) as file:
        size = file.seek(0, 2)
    if size > MAX_ADAPTER_BYTES:
        raise ConversionError(f"{path.name}: expected at most {MAX_ADAPTER_BYTES} bytes, got {size}")
