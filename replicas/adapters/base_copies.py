"""Compares the base's own embedding and head, which PEFT saves beside some adapters, with those of the served base."""

from pathlib import Path

import torch
from torch import Tensor

from ranklet.replicas.adapters.findings import Checked, shorten
from ranklet.replicas.adapters.safetensors_file import DTYPES, StoredTensor, read_tensor

FLOATS = "float32, bfloat16 or float16"


def check_base_copy(path: Path, stored: StoredTensor, name: str, base: Tensor) -> Checked[None]:
    """Compare the file's copy of `name` with the served base's, up to the rounding of either's dtype."""
    key = shorten(stored.key)
    if stored.shape != tuple(base.shape):
        yield f"{key}: expected the base's {list(base.shape)}, got {list(stored.shape)}; its vocabulary differs"
    elif stored.dtype not in DTYPES:
        yield f"{key}: expected {FLOATS}, got {stored.dtype}"
    else:
        copy = read_tensor(path, stored)
        ours = base.to(copy.dtype).to(base.dtype)
        if not torch.equal(copy.to(base.device).to(base.dtype), ours):
            yield f"{key}: differs from the served base's {name}; modules trained whole are not supported"
