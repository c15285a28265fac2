"""Where an engine runs and in which precision, from its settings."""

import torch

from ranklet.replicas.config import EngineConfig


def pick_device(config: EngineConfig) -> torch.device:
    """The device that the settings name; "auto" is CUDA where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def pick_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype that the settings name; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if config.dtype == "auto":
        return torch.bfloat16 if pick_device(config).type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, config.dtype)
    return found
