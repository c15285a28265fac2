"""A small model of each family that generates text, with the six adapters of the demo and eight prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.assets.adapters import AdapterSpec, make_adapters
from tests.assets.make import LLAMA3_ROPE, make_model

MAX_TOKENS = 64
LENGTHS = (1, 5, 17, 40, 63, 64, 65, 130)  # of the prompts; pages have 64 tokens


@dataclass(frozen=True)
class Family:
    """Arguments of `make_model`, and a seed of prompts whose greedy texts have no two tokens close together."""

    model: dict[str, Any]
    prompt_seed: int


FAMILIES = {
    "qwen3": Family({"architecture": "qwen3"}, 1),
    "qwen2": Family({"architecture": "qwen2", "tied": False}, 56),
    "llama": Family({"architecture": "llama", "tied": False, "rope": LLAMA3_ROPE}, 13),
    "mistral": Family({"architecture": "mistral", "tied": False, "config": {"sliding_window": 40}}, 6),
}


def make_family(folder: Path, name: str) -> list[AdapterSpec]:
    """Write `folder`/model and `folder`/adapters. Returns the adapters."""
    model = make_model(folder / "model", text=True, pooling=None, **FAMILIES[name].model)
    return make_adapters(model, folder / "adapters")


def family_prompts(name: str) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(FAMILIES[name].prompt_seed)
    return [rng.integers(3, 1000, length, dtype=np.int32) for length in LENGTHS]
