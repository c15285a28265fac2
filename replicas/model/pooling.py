"""Pools the token states of each prompt into a vector, as the folder's sentence-transformers files configure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.folder import read_default_prompt, read_json, read_settings

_MODES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_FLAGS = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class Pooling:
    """How token states become vectors. Letters: T tokens, B prompts, H hidden width."""

    mode: str = "last"  # last, mean or cls
    normalize: bool = True
    max_tokens: int | None = None  # the folder's limit on the tokens of a prompt

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        """Select the states that pooling reads: [T, H] -> [B, H] for last and cls, or [T, H] for mean."""
        if self.mode == "last":
            return states[spans.offsets[1:] - 1]
        if self.mode == "cls":  # an empty prompt of a padded batch may start after the last row
            return states[spans.offsets[:-1].clamp(max=states.shape[0] - 1)]
        return states

    def vectors(self, rows: Tensor, spans: Spans) -> Tensor:
        """Pool the rows that `rows` selected to float32 [B, H]."""
        pooled = rows.float()
        if self.mode == "mean":
            lengths = spans.offsets.diff()
            requests = torch.arange(len(spans.lengths), device=rows.device)
            owner = torch.repeat_interleave(requests, lengths, output_size=rows.shape[0])
            sums = pooled.new_zeros(len(spans.lengths), pooled.shape[1]).index_add_(0, owner, pooled)
            pooled = sums / lengths[:, None]
        return self.normalized(pooled)

    def normalized(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=1) if self.normalize else vectors


def read_pooling(model_dir: Path) -> Pooling:
    """Read the folder's pooling. Without `modules.json` it is that of Qwen3-Embedding: last token and L2 norm.

    Raises:
        ModelError: a module or an option of the pooling is not supported.
    """
    modules_file = model_dir / "modules.json"
    if not modules_file.is_file():
        return Pooling()
    try:
        modules = {str(each["type"]).rsplit(".", 1)[-1]: str(each["path"]) for each in read_json(modules_file, list)}
    except (KeyError, TypeError) as error:
        raise ModelError(f"{modules_file}: expected modules with type and path, got: {error!r}") from error
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ModelError(f"{modules_file}: expected Transformer, Pooling, Normalize; got also {', '.join(unknown)}")
    mode = "last"
    if "Pooling" in modules:
        mode = _mode(model_dir / modules["Pooling"] / "config.json", read_default_prompt(model_dir))
    limits = model_dir / modules.get("Transformer", "") / "sentence_bert_config.json"
    limit = read_settings(limits).get("max_seq_length")
    return Pooling(mode=mode, normalize="Normalize" in modules, max_tokens=limit)


def _mode(path: Path, default_prompt: str) -> str:
    if not path.is_file():
        raise ModelError(f"{path}: expected the pooling config that modules.json names, but the file is missing")
    config: dict[str, Any] = read_json(path, dict)
    flags = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    configured = config.get("pooling_mode") or flags
    names = [configured] if isinstance(configured, str) else list(configured)
    known = _MODES | _FLAGS
    if len(names) != 1 or names[0] not in known:
        raise ModelError(f"{path}: expected one pooling mode of {', '.join(_MODES)}, got {', '.join(names) or 'none'}")
    mode = known[names[0]]
    if mode == "mean" and default_prompt and not config.get("include_prompt", True):
        raise ModelError(f"{path}: include_prompt: expected true for mean pooling with a default prompt, got false")
    return mode
