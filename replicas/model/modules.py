"""Names of the decoder modules that LoRA can target. Imports no torch."""

from ranklet.kernels.packs import PACKS

ATTENTION_MODULES = (*PACKS["qkv"], *PACKS["o"])
MLP_MODULES = (*PACKS["gate_up"], *PACKS["down"])
LINEAR_MODULES = (*ATTENTION_MODULES, *MLP_MODULES)
EMBED_TOKENS = "embed_tokens"
LORA_MODULES = (*LINEAR_MODULES, EMBED_TOKENS)

Module = tuple[int, str]  # (layer, name); the layer of `embed_tokens` is EMBEDDING
EMBEDDING = -1


def module_path(module: str) -> str:
    """Return a linear module's name within its layer in checkpoints, such as `self_attn.q_proj`."""
    return f"{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"
