"""A small model of each family that generates text, with the six adapters of the demo and eight prompts."""

import fcntl
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.assets.adapters import AdapterSpec, adapter_specs, make_adapters
from tests.assets.make import LLAMA3_ROPE, make_model
from tests.assets.text_oracle import ReferenceText, reference_text

MAX_TOKENS = 64
LENGTHS = (1, 5, 17, 40, 63, 64, 65, 130)  # of the prompts; pages have 64 tokens


@dataclass(frozen=True)
class Family:
    """Arguments of `make_model`, and a seed of prompts whose greedy texts have no two tokens close together."""

    model: dict[str, Any]
    prompt_seed: int


FAMILIES = {
    "qwen3": Family({"architecture": "qwen3"}, 20),
    "qwen2": Family({"architecture": "qwen2", "tied": False}, 56),
    "llama": Family({"architecture": "llama", "tied": False, "rope": LLAMA3_ROPE}, 35),
    "mistral": Family({"architecture": "mistral", "tied": False, "config": {"sliding_window": 40}}, 27),
}


def make_family(folder: Path, name: str) -> list[AdapterSpec]:
    """Write `folder`/model and `folder`/adapters. Returns the adapters."""
    model = make_model(folder / "model", text=True, pooling=None, **FAMILIES[name].model)
    return make_adapters(model, folder / "adapters")


def family_prompts(name: str) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(FAMILIES[name].prompt_seed)
    return [rng.integers(3, 1000, length, dtype=np.int32) for length in LENGTHS]


@dataclass(frozen=True)
class FamilyText:
    """A model, its adapters, and greedy texts of MAX_TOKENS: first the base model's, then each adapter's."""

    model: Path
    adapters: list[AdapterSpec]
    texts: list[list[ReferenceText]]


def family_texts(folder: Path, name: str) -> FamilyText:
    """Write the family and its texts below `folder`/`name`, unless they are there already."""
    where = folder / name
    where.mkdir(parents=True, exist_ok=True)
    saved = where / "texts.npz"
    with (where / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not saved.exists():
            folders = [None, *(spec.path for spec in make_family(where, name))]
            prompts = family_prompts(name)
            texts = [reference_text(where / "model", each, prompts, MAX_TOKENS) for each in folders]
            columns: dict[str, Any] = {
                field.name: [[getattr(text, field.name) for text in row] for row in texts] for field in _FIELDS
            }
            np.savez(where / "unfinished.npz", **columns)
            (where / "unfinished.npz").rename(saved)
    with np.load(saved) as file:
        rows = zip(*(file[field.name] for field in _FIELDS), strict=True)
        texts = [[ReferenceText(*each) for each in zip(*row, strict=True)] for row in rows]
    return FamilyText(where / "model", adapter_specs(where / "adapters"), texts)


_FIELDS = fields(ReferenceText)
