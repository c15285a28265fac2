"""Names of the decoder modules that LoRA can target. Imports no torch."""

from ranklet.kernels.packs import PACKS

ATTENTION_MODULES = (*PACKS["qkv"], *PACKS["o"])
MLP_MODULES = (*PACKS["gate_up"], *PACKS["down"])
LINEAR_MODULES = (*ATTENTION_MODULES, *MLP_MODULES)
# The modules of qkv_proj and gate_up_proj, which some checkpoints have instead.
FUSED_MODULES = {f"{pack}_proj": modules for pack, modules in PACKS.items() if len(modules) > 1}
EMBED_TOKENS = "embed_tokens"
LM_HEAD = "lm_head"
LORA_MODULES = (*LINEAR_MODULES, EMBED_TOKENS)  # the default of EngineConfig.lora_modules
ALL_MODULES = (*LORA_MODULES, LM_HEAD)

Module = tuple[int, str]  # (layer, name); `embed_tokens` and `lm_head` have the layers EMBEDDING and HEAD
EMBEDDING = -1
HEAD = -2


def module_path(module: str) -> str:
    """Return a linear module's name within its layer in checkpoints, such as `self_attn.q_proj`."""
    first = FUSED_MODULES.get(module, (module,))[0]
    return f"{'self_attn' if first in ATTENTION_MODULES else 'mlp'}.{module}"
