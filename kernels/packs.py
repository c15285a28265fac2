"""The modules of a decoder layer that share one packed projection, in the order of its slices.

This module imports no torch, so that settings and commands load fast.
"""

PACKS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
