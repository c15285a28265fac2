"""Pools the token states of each prompt into a vector, as the folder's sentence-transformers files configure."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.dense_settings import DenseSettings
from ranklet.replicas.model.embedding_settings import read_base_settings


@dataclass(frozen=True)
class Pooling:
    """How token states become vectors. Letters: T tokens, B prompts, H hidden width.

    Attributes:
        mode: last, mean or cls.
        skips: whether the first `Spans.skipped` tokens of each prompt are left out, by the modes mean and cls.
        max_tokens: the folder's limit on the tokens of a prompt.
        dense: layers before the normalization, which the host computes.
    """

    mode: str = "last"
    normalize: bool = True
    skips: bool = False
    max_tokens: int | None = None
    dense: tuple[DenseSettings, ...] = ()

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        """Select the states that pooling reads: [T, H] -> [B, H] for last and cls, or [T, H] for mean."""
        if self.mode == "last":
            return states[spans.offsets[1:] - 1]
        if self.mode == "cls":  # an empty prompt of a padded batch may start after the last row
            first = spans.offsets[:-1]
            if spans.skipped is not None and self.skips:
                first = first + torch.where(spans.skipped < spans.offsets.diff(), spans.skipped, 0)
            return states[first.clamp(max=states.shape[0] - 1)]
        return states

    def vectors(self, rows: Tensor, spans: Spans) -> Tensor:
        """Pool the rows that `rows` selected to float32 [B, H]."""
        pooled = rows.float()
        if self.mode == "mean":
            lengths = spans.offsets.diff()
            requests = torch.arange(len(spans.lengths), device=rows.device)
            owner = torch.repeat_interleave(requests, lengths, output_size=rows.shape[0])
            if spans.skipped is not None and self.skips:
                first = spans.offsets[:-1] + spans.skipped
                is_read = torch.arange(rows.shape[0], device=rows.device) >= first[owner]
                pooled = torch.where(is_read[:, None], pooled, 0)
                lengths = (lengths - spans.skipped).clamp(min=1)
            sums = pooled.new_zeros(len(spans.lengths), pooled.shape[1]).index_add_(0, owner, pooled)
            pooled = sums / lengths[:, None]
        return self.normalized(pooled)

    def normalized(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=1) if self.normalize else vectors


def read_pooling(model_dir: Path) -> Pooling:
    """Read the pooling of a base model's folder.

    Raises:
        ModelError: a setting of the folder's embeddings is not supported.
    """
    settings = read_base_settings(model_dir)
    return Pooling(settings.mode, settings.normalize, max_tokens=settings.max_tokens, dense=settings.dense)
