"""Writes adapters with PEFT and gives them random weights, because an untrained LoRA has B = 0 and changes nothing."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Head = Literal["causal", "bare"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter folder of the demo."""

    name: str
    path: Path
    rank: int  # the highest in the folder
    targets: tuple[str, ...]
    note: str  # its special feature in a word or two; may be empty


@dataclass(frozen=True)
class _Recipe:
    name: str
    targets: tuple[str, ...]
    note: str
    lora: dict[str, Any]

    @property
    def rank(self) -> int:
        return max(int(rank) for rank in (self.lora["r"], *self.lora.get("rank_pattern", {}).values()))


RECIPES = (
    _Recipe("legal-v2", ATTENTION, "", {"r": 64, "lora_alpha": 128}),
    _Recipe("medical", LINEAR, "", {"r": 16, "lora_alpha": 32}),
    _Recipe("support-rs", LINEAR, "rsLoRA", {"r": 32, "lora_alpha": 16, "use_rslora": True}),
    _Recipe(
        "code-mixed",
        LINEAR,
        "patterns",
        {
            "r": 8,
            "lora_alpha": 16,
            "rank_pattern": {"q_proj": 24, "layers.1.mlp.down_proj": 48, "o_proj": 4},
            "alpha_pattern": {"q_proj": 40, "layers.2.self_attn.v_proj": 10},
        },
    ),
    _Recipe("finance-mlp", MLP, "", {"r": 4, "lora_alpha": 8}),
    _Recipe("catalog-embed", (*ATTENTION, "embed_tokens"), "embed", {"r": 12, "lora_alpha": 12}),
)


def make_adapters(model_dir: Path, out_dir: Path) -> list[AdapterSpec]:
    """Write the six adapters of the demo for a model, each in a folder of its name."""
    for recipe in RECIPES:
        save_adapter(model_dir, out_dir / recipe.name, target_modules=list(recipe.targets), **recipe.lora)
    return adapter_specs(out_dir)


def adapter_specs(out_dir: Path) -> list[AdapterSpec]:
    """Descriptions of the adapters that `make_adapters` writes into `out_dir`."""
    return [AdapterSpec(made.name, out_dir / made.name, made.rank, made.targets, made.note) for made in RECIPES]


def save_adapter(
    model_dir: Path, folder: Path, *, head: Head = "causal", seed: int | None = None, strength: float = 0.6, **lora: Any
) -> Path:
    """Write one adapter through `get_peft_model(...).save_pretrained`. Returns `folder`.

    Args:
        head: "causal" gives keys `base_model.model.model.layers...`, "bare" (AutoModel) `base_model.model.layers...`.
        seed: seed of the weights; by default it is derived from the folder's name.
        strength: size of a layer's change relative to the layer's output.
        lora: fields of `LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = get_peft_model(load_base(model_dir, head), LoraConfig(**lora))
        randomize_adapter(model, seed=seed_of(folder.name) if seed is None else seed, strength=strength)
        model.save_pretrained(str(folder))
    return folder


def save_sentence_transformers_adapter(model_dir: Path, folder: Path, *, strength: float = 0.6, **lora: Any) -> Path:
    """Write one adapter as sentence-transformers does after training: `add_adapter`, then `save_pretrained`."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    with quiet():
        model = SentenceTransformer(str(model_dir), device="cpu")
        model.add_adapter(LoraConfig(**lora))
        randomize_adapter(model, seed=seed_of(folder.name), strength=strength)
        model.save_pretrained(str(folder), create_model_card=False)
    return folder


def load_base(model_dir: Path, head: Head) -> "nn.Module":
    """Load a folder's transformers model in float32, with or without its LM head."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if head == "causal" else AutoModel
    model: nn.Module = kind.from_pretrained(str(model_dir), dtype=torch.float32)
    return model


def randomize_adapter(model: "nn.Module", *, seed: int, strength: float) -> None:
    """Fill every LoRA matrix so that each layer's change has about `strength` times the size of its base output.

    A keeps PEFT's scale. B gets the scale at which `scaling * B @ A @ x` has that size for a normalised x. Magnitudes
    of DoRA and trained biases are changed too.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(seed)

    def fill(weight: "torch.Tensor", std: float) -> None:
        weight.copy_(std * torch.randn(weight.shape, generator=generator))

    with torch.no_grad():
        for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for name, scaling in module.scaling.items():
                std = strength / (scaling * module.r[name] ** 0.5)
                if name in module.lora_embedding_A:
                    fill(module.lora_embedding_A[name], 1.0)
                    fill(module.lora_embedding_B[name], std)
                else:
                    into_a = module.lora_A.get_parameter(f"{name}.weight")  # [r, in]
                    fill(into_a, into_a.shape[1] ** -0.5)
                    fill(module.lora_B.get_parameter(f"{name}.weight"), std)
                    if module.lora_bias[name]:
                        fill(module.lora_B.get_parameter(f"{name}.bias"), 0.3)
                if name in module.lora_magnitude_vector:
                    magnitude = module.lora_magnitude_vector.get_parameter(f"{name}.weight")
                    magnitude.mul_(1 + 0.3 * torch.randn(magnitude.shape, generator=generator))
        for key, bias in model.named_parameters():
            if key.endswith(".bias") and "lora_" not in key and bias.requires_grad:  # PEFT trains it
                fill(bias, 0.3)


def seed_of(name: str) -> int:
    """Derive a seed from a name; it is equal in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, and warnings about intended effects such as saved embeddings."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
