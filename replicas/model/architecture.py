"""Reads the dimensions of a decoder from the `config.json` of its folder. Refuses models that cannot be served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.git_lfs import pointer_problem
from ranklet.replicas.model.modules import EMBED_TOKENS, LINEAR_MODULES, LM_HEAD

_FAMILIES = ("Qwen3", "Qwen2", "Llama", "Mistral", "SmolLM3")
_ARCHITECTURES = tuple(f"{family}{head}" for family in _FAMILIES for head in ("Model", "ForCausalLM"))
# Rotary variants whose frequencies do not depend on the prompt's length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a decoder of one of the supported families.

    Attributes:
        windows: by layer, how many tokens a token attends to, itself included; None for no limit.
        unrotated: layers whose queries and keys have no rotary position embedding.
        matryoshka: widths below `hidden` to which embeddings may be shortened; None for any.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    qk_norm: bool
    windows: tuple[int | None, ...]
    max_position: int
    matryoshka: tuple[int, ...] | None = None
    unrotated: tuple[int, ...] = ()

    def module_dims(self) -> dict[str, tuple[int, int]]:
        """Return (input width, output width) of each linear module of a layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)
        mlp = (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return dict(zip(LINEAR_MODULES, attention + mlp, strict=True))

    def dims(self, name: str) -> tuple[int, int]:
        """Return (input width, output width) of any module that LoRA can target."""
        if name == EMBED_TOKENS:
            return self.vocab, self.hidden
        return (self.hidden, self.vocab) if name == LM_HEAD else self.module_dims()[name]


def read_config(model_dir: Path) -> Any:
    """Read the folder's transformers config.

    Raises:
        ModelError: the folder does not exist or has no readable config.
    """
    if not (model_dir / "config.json").is_file():
        snapshot = next(iter(sorted(model_dir.glob("snapshots/*/config.json"))), None)
        hint = "" if snapshot is None else f"; the model is below, in {snapshot.parent}"
        raise ModelError(f"model_dir: expected a folder with config.json and safetensors, got {str(model_dir)!r}{hint}")
    problem = pointer_problem(model_dir / "config.json")
    if problem is not None:
        raise ModelError(f"{model_dir}: {problem}")
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{model_dir / 'config.json'}: cannot be read as a transformers config: {error}") from error


def read_architecture(config: Any) -> Architecture:
    """Return the decoder that a config describes.

    Raises:
        ModelError: the architecture or one of its options is not supported; the message names it.
    """
    _check_supported(config)
    name, heads = config.architectures[0], config.num_attention_heads
    return Architecture(
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        qk_norm=name.startswith("Qwen3"),
        windows=_windows(config),
        max_position=config.max_position_embeddings,
        matryoshka=_matryoshka(config),
        unrotated=_unrotated(config),
    )


def _check_supported(config: Any) -> None:
    names = config.architectures or ["(none)"]
    if names[0] not in _ARCHITECTURES:
        raise ModelError(f"architectures: expected one of {', '.join(_ARCHITECTURES)}, got {names[0]}")
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act: expected silu, got {config.hidden_act}")
    if getattr(config, "quantization_config", None):
        raise ModelError("quantization_config: expected an unquantized model; serve the bf16 or float32 weights")
    if getattr(config, "is_causal", True) is False:
        raise ModelError("is_causal: expected a causal decoder, got false (bidirectional models are not supported)")
    rope = _rope_type(config)
    if rope not in _ROPE_TYPES:
        raise ModelError(f"rope_parameters: expected rope_type to be one of {', '.join(_ROPE_TYPES)}, got {rope}")
    rotated = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise ModelError(f"rope_parameters: expected partial_rotary_factor 1, got {rotated}")


def _matryoshka(config: Any) -> tuple[int, ...] | None:
    """Read the fields that vLLM reads too. Models without them are trained for any width, or say nothing."""
    widths, hidden = getattr(config, "matryoshka_dimensions", None), config.hidden_size
    if widths is None:
        return () if getattr(config, "is_matryoshka", None) is False else None
    if not isinstance(widths, list) or not all(type(width) is int and 1 <= width <= hidden for width in widths):
        raise ModelError(f"matryoshka_dimensions: expected a list of integers from 1 to {hidden}, got {widths!r}")
    return tuple(sorted({width for width in widths if width < hidden}))


def _windows(config: Any) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and window >= config.max_position_embeddings:
        window = None  # no prompt is longer
    if kinds is None:  # Mistral has one window for all layers, Llama has none
        return (window,) * int(config.num_hidden_layers)
    other = set(kinds) - {"sliding_attention", "full_attention"}
    if other:
        raise ModelError(f"layer_types: expected full_attention and sliding_attention, got {', '.join(sorted(other))}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _unrotated(config: Any) -> tuple[int, ...]:
    """Read SmolLM3's field, which despite its name is 1 for layers with rotary position embeddings."""
    rotated, layers = getattr(config, "no_rope_layers", None) or (), int(config.num_hidden_layers)
    if rotated and len(rotated) < layers:
        raise ModelError(f"no_rope_layers: expected a number for each of {layers} layers, got {len(rotated)}")
    return tuple(layer for layer, rotates in enumerate(rotated[:layers]) if not rotates)


def _rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def rotary_tables(config: Any, architecture: Architecture, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position, float32 [length, head_dim / 2] each."""
    if _rope_type(config) == "default":
        theta = config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        frequencies, factor = 1.0 / (theta**exponents), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[_rope_type(config)](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def layer_tables(
    config: Any, architecture: Architecture, length: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's cosines and sines. Kernels rotate by angles of 0 where a layer rotates nothing."""
    cos, sin = rotary_tables(config, architecture, length, device)
    still = (torch.ones_like(cos), torch.zeros_like(sin)) if architecture.unrotated else None
    return [
        still if still is not None and layer in architecture.unrotated else (cos, sin)
        for layer in range(architecture.layers)
    ]
