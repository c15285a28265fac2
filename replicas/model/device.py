"""Resolves the device and dtype settings of an engine."""

import torch

from ranklet.replicas.config import EngineConfig


def pick_device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def pick_dtype(config: EngineConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if pick_device(config).type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, config.dtype)
    return found
