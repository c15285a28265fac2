"""Reads the dimensions of a decoder from the `config.json` of its folder. Refuses models that cannot be served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ranklet.kernels.packs import PACKS
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.git_lfs import pointer_problem
from ranklet.replicas.model.modules import EMBED_TOKENS, FUSED_MODULES, LINEAR_MODULES, LM_HEAD

_FAMILIES = ("Qwen3", "Qwen2", "Llama", "Mistral", "SmolLM3", "Phi3")
_GEMMA = ("Gemma3TextModel", "Gemma3ForCausalLM")
_ARCHITECTURES = (*(f"{family}{head}" for family in _FAMILIES for head in ("Model", "ForCausalLM")), *_GEMMA)
# Rotary variants whose frequencies do not depend on the prompt's length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_PHI3_ROPE_TYPES = ("default", "longrope")


@dataclass(frozen=True)
class GemmaScales:
    """Factors of a Gemma 3 decoder, which also has norms behind attention and MLP, GELU, and norms' weights less 1.

    Attributes:
        embedding: of each token's embedding.
        query: of queries, so that attention divides their products with keys by the square root of the head's width.
    """

    embedding: float
    query: float


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a decoder of one of the supported families.

    Attributes:
        windows: by layer, how many tokens a token attends to, itself included; None for no limit.
        max_position: the longest text that the model computes.
        unrotated: layers whose queries and keys have no rotary position embedding.
        rotated: how many columns of a query or key head are rotated; None for all.
        fused: whether checkpoints and adapters have one module for q, k and v, and one for gate and up.
        longrope: whether texts beyond `max_position` need other rotary frequencies, which are not supported.
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
    rotated: int | None = None
    fused: bool = False
    longrope: bool = False
    gemma: GemmaScales | None = None

    def module_dims(self) -> dict[str, tuple[int, int]]:
        """Return (input width, output width) of each linear module of a layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)
        mlp = (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return dict(zip(LINEAR_MODULES, attention + mlp, strict=True))

    def stored_modules(self) -> tuple[str, ...]:
        """Return the linear modules of a layer as checkpoints and adapters have them."""
        return tuple(f"{pack}_proj" for pack in PACKS) if self.fused else LINEAR_MODULES

    def dims(self, name: str) -> tuple[int, int]:
        """Return (input width, output width) of any module that LoRA can target."""
        if name == EMBED_TOKENS:
            return self.vocab, self.hidden
        if name == LM_HEAD:
            return self.hidden, self.vocab
        dims = [self.module_dims()[part] for part in FUSED_MODULES.get(name, (name,))]
        return dims[0][0], sum(out for _, out in dims)

    def order_heads(self, qkv: Tensor) -> None:
        """Reorder the columns of query and key heads in place, so that halves of a head rotate with each other.

        With partial rotation, checkpoints have the two rotated halves first and the rest behind them. The order of the
        columns changes no product of a query with a key.

        Args:
            qkv: columns of the packed queries, keys and values, as rows of a matrix or entries of a vector.
        """
        if self.rotated is None:
            return
        half, rest = self.rotated // 2, (self.head_dim - self.rotated) // 2
        low, high, still, more = torch.arange(self.head_dim).split((half, half, rest, rest))
        order = torch.cat((low, still, high, more)).to(qkv.device)
        heads = qkv[: (self.heads + self.kv_heads) * self.head_dim].view(-1, self.head_dim, *qkv.shape[1:])
        heads.copy_(heads[:, order])


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
        head_dim=_head_dim(config),
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        qk_norm=name.startswith(("Qwen3", "Gemma3")),
        windows=_windows(config),
        max_position=_max_position(config),
        matryoshka=_matryoshka(config),
        unrotated=_unrotated(config),
        rotated=_rotated(config),
        fused=name.startswith("Phi3"),
        longrope=_rope_type(config) == "longrope",
        gemma=_gemma_scales(config) if name in _GEMMA else None,
    )


def _check_supported(config: Any) -> None:
    names = config.architectures or ["(none)"]
    if names[0] not in _ARCHITECTURES:
        raise ModelError(f"architectures: expected one of {', '.join(_ARCHITECTURES)}, got {names[0]}")
    is_gemma = names[0] in _GEMMA
    field, activation = ("hidden_activation", "gelu_pytorch_tanh") if is_gemma else ("hidden_act", "silu")
    if getattr(config, field) != activation:
        raise ModelError(f"{field}: expected {activation}, got {getattr(config, field)}")
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if is_gemma and getattr(config, field):
            raise ModelError(f"{field}: expected none, got {getattr(config, field)}; it is not supported")
    if getattr(config, "quantization_config", None):
        raise ModelError("quantization_config: expected an unquantized model; serve the bf16 or float32 weights")
    if getattr(config, "is_causal", True) is False:
        raise ModelError("is_causal: expected a causal decoder, got false (bidirectional models are not supported)")
    is_phi3 = names[0].startswith("Phi3")
    types = _PHI3_ROPE_TYPES if is_phi3 else _ROPE_TYPES
    for kind in _rope_kinds(config):
        rope, factor = _rope_type(config, kind), _rope(config, kind).get("partial_rotary_factor", 1.0)
        if rope not in types:
            raise ModelError(f"rope_parameters: expected rope_type to be one of {', '.join(types)}, got {rope}")
        if factor != 1.0 and not is_phi3:
            raise ModelError(f"rope_parameters: expected partial_rotary_factor 1, got {factor}")


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
    if window is not None and window >= _max_position(config):
        window = None  # no text is longer
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


def _gemma_scales(config: Any) -> GemmaScales:
    return GemmaScales(config.hidden_size**0.5, (_head_dim(config) / config.query_pre_attn_scalar) ** 0.5)


def _rope_kinds(config: Any) -> list[str | None]:
    """Return the kind of each layer that chooses its rotary parameters; None where all layers have the same."""
    kinds = list(getattr(config, "layer_types", None) or ())
    nested = any(isinstance(each, dict) for each in (getattr(config, "rope_parameters", None) or {}).values())
    return kinds if nested else [None] * int(config.num_hidden_layers)


def _rope(config: Any, kind: str | None = None) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or {}
    return found if kind is None else found[kind]


def _rope_type(config: Any, kind: str | None = None) -> str:
    return str(_rope(config, kind).get("rope_type", "default"))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> int | None:
    factor, width = _rope(config).get("partial_rotary_factor", 1.0), _head_dim(config)
    rotated = int(width * factor)
    if not 0 < rotated <= width or rotated % 2 or width % 2:
        raise ModelError(f"partial_rotary_factor: expected an even part of heads of {width} columns, got {rotated}")
    return None if rotated == width else rotated


def _max_position(config: Any) -> int:
    longest = int(config.max_position_embeddings)
    if _rope_type(config) != "longrope":
        return longest
    return min(longest, int(_rope(config)["original_max_position_embeddings"]))


def rotary_tables(
    config: Any, architecture: Architecture, length: int, device: torch.device, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position, float32 [length, head_dim / 2] each.

    Columns that are not rotated have angles of 0.

    Args:
        kind: of a layer, if kinds differ in their rotary parameters.
    """
    width = architecture.rotated or architecture.head_dim
    if _rope_type(config, kind) == "default":
        theta = _rope(config, kind)["rope_theta"]
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        frequencies, factor = 1.0 / (theta**exponents), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[_rope_type(config, kind)](
            config, torch.device("cpu"), layer_type=kind
        )
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
    still = (0, (architecture.head_dim - width) // 2)
    cos, sin = functional.pad(angles.cos() * factor, still, value=1.0), functional.pad(angles.sin() * factor, still)
    return cos.to(device), sin.to(device)


def layer_tables(
    config: Any, architecture: Architecture, length: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's cosines and sines. Kernels rotate by angles of 0 where a layer rotates nothing."""
    kinds = _rope_kinds(config)
    tables = {kind: rotary_tables(config, architecture, length, device, kind) for kind in set(kinds)}
    if architecture.unrotated:
        cos, sin = tables[kinds[0]]
        still = torch.ones_like(cos), torch.zeros_like(sin)
    return [still if layer in architecture.unrotated else tables[kind] for layer, kind in enumerate(kinds)]
