"""Names in an adapter's files: the keys of its tensors, and the names of modules in the model that was trained."""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Module, module_path

EMBEDDING_MODULE: Module = (EMBEDDING, EMBED_TOKENS)
HEAD_MODULE: Module = (HEAD, LM_HEAD)

# `base_model.model.` from PEFT, `model.` from causal-LM wrappers, `0.auto_model.` from sentence-transformers, or none.
_PREFIX = r"(?P<prefix>(?:(?:base_model|model|auto_model|\d+)\.)*?)"
_KEY = re.compile(
    _PREFIX + r"(?:layers\.(?P<layer>\d+)\.(?:self_attn\.(?=[qkvo]_|qkv_)|mlp\.(?=gate_|up_|down_)))?"
    r"(?P<name>(?:gate_)?[a-z]+_proj|embed_tokens|lm_head)"
    r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)
# PEFT saves a whole embedding or head that was trained, and the base's own beside an adapter that targets one of them,
# or whose vocabulary it takes for resized. `original_module` is the base's own beside a trained one.
_WHOLE = re.compile(
    _PREFIX + r"(?P<name>embed_tokens|lm_head)\.(?:(?P<original>original_module\.)|(?P<trained>modules_to_save\."
    r"(?:default\.)?)|(?P<base>(?:token_adapter\.)?base_layer\.))?weight"
)
_SOME_ROWS = re.compile(
    _PREFIX + r"(?P<name>embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta(?:\.default)?"
)
# What DoRA and trained biases save: `bias` is that of the base's own layer, `lora_B.bias` that of B.
_TERM = re.compile(
    r"(?P<module>.*?)\.(?:(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<lora_bias>lora_B\.bias)|"
    r"(?:base_layer\.)?(?P<bias>bias))"
)
_MAX_KEY_CHARS = 512
UNUSED_WHOLE = 3
_OUTSIDE_LAYERS = {EMBED_TOKENS: EMBEDDING, LM_HEAD: HEAD}


class LoraKey(NamedTuple):
    """The key of one half of a module's LoRA; `side` is A or B."""

    prefix: str
    module: Module
    side: str


def parse_key(key: str) -> LoraKey | None:
    """Parse the key of a tensor. Returns None if the tensor is not A or B of a module's LoRA."""
    found = _KEY.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None
    if found is None or bool(found["embedding"]) != (found["name"] == EMBED_TOKENS):
        return None
    layer = found["layer"] or _OUTSIDE_LAYERS.get(found["name"])
    return None if layer is None else LoraKey(found["prefix"], (int(layer), found["name"]), found["side"])


def parse_term(key: str) -> tuple[Module, str] | None:
    """Return the module and `magnitude`, `lora_bias` or `bias` if the key is that of a vector by output column."""
    found = _TERM.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None
    if found is None or found.lastgroup is None:
        return None
    embedding = "embedding_" * found["module"].endswith(EMBED_TOKENS)
    of = parse_key(f"{found['module']}.lora_{embedding}A")
    return None if of is None else (of.module, found.lastgroup)


def parse_whole(key: str) -> tuple[str, int] | None:
    """Parse the key of a whole embedding or head.

    Returns:
        `embed_tokens` or `lm_head`, and the preference among several of this name, the lowest first. PEFT uses none of
        preference UNUSED_WHOLE. None if the key is of another tensor.
    """
    found = _WHOLE.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None
    if found is None:
        return None
    kinds = (None, "trained", "base", "original")
    return found["name"], kinds.index(found.lastgroup if found.lastgroup != "name" else None)


def parse_some_rows(key: str) -> str | None:
    """Return `embed_tokens` or `lm_head` if the key is that of rows of some tokens."""
    found = _SOME_ROWS.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None
    return found and found["name"]


def full_names(keys: Collection[str], modules: Iterable[Module]) -> dict[Module, str]:
    """Return the name of each module in the model that was trained, which patterns in the config may contain.

    The head is among them only if that model had one: it is outside of the `model.` that contains the layers.

    Args:
        keys: of the adapter's tensors.
        modules: modules of the decoder.
    """
    has_head = any(LM_HEAD in key and _is_head(parse_key(key)) for key in keys)
    first = next((found for found in map(parse_key, keys) if found is not None and not _is_head(found)), None)
    prefix = "model." * has_head if first is None else first.prefix.removeprefix("base_model.model.")
    names = {module: prefix + _path_in_model(module) for module in modules}
    if has_head or f".{prefix}".endswith(".model."):
        names[HEAD_MODULE] = prefix.removesuffix("model.") + LM_HEAD
    return names


def _is_head(key: LoraKey | None) -> bool:
    return key is not None and key.module == HEAD_MODULE


def _path_in_model(module: Module) -> str:
    layer, name = module
    return name if layer == EMBEDDING else f"layers.{layer}.{module_path(name)}"
