"""A decoder's forward pass for short batches with keys and values in pages, with few launches.

`Decoder.forward` serves every batch. `RowDecoder` serves short batches on a Hopper GPU: the products of `row_gemm.py`
include norms, adapters, activation and residual stream.

Letters as in `decoder.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ranklet.kernels import dispatch, row_gemm, row_norm
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.paged_spans import LayerPages
from ranklet.kernels.row_gemm import NextNorm, NormedRows, RowLora, Workspace
from ranklet.kernels.row_gemm_tiles import MOST_ROWS
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.replicas.model.attention import attend
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, Projection, Stacks, kv_write

_MOST_DECODES = 256
# Of batches with prompts. A block of rows adds the output of its adapters one group after the other, and cuBLAS takes
# less time for larger products.
_MOST_ADAPTERS = 16
_MOST_RANK = 64  # of those that were measured
_MOST_VALUES = 1 << 20  # tokens times hidden width


class RowDecoder:
    """Computes hidden states with a decoder's weights.

    Raises:
        ValueError: the decoder's shapes or its device are not supported; see `supports`.
    """

    def __init__(self, decoder: Decoder) -> None:
        if not supports(decoder):
            raise ValueError("decoder: expected bfloat16 on a Hopper GPU, and widths that are multiples of 16")
        self._decoder = decoder
        shape = decoder.architecture
        self._workspace = Workspace(decoder.device, shape.hidden)
        self._arrivals = torch.zeros(MOST_ROWS * shape.kv_heads, dtype=torch.int32, device=decoder.device)

    def forward(
        self, batch: DeviceBatch, stacks: Sequence[Stacks], embedding: EmbeddingStack | None,
        pages: Sequence[LayerPages],
    ) -> Tensor:  # fmt: skip
        """Compute the hidden states before the final norm. Arguments and result are those of `Decoder.forward`.

        Args:
            batch: of at most `MOST_ROWS` tokens. The tiles of its LoRA are padded.
        """
        decoder, shape = self._decoder, self._decoder.architecture
        layers, eps, heads = decoder.layers, shape.eps, (shape.heads, shape.kv_heads)
        embedded = dispatch.embedding(batch.ids, decoder.embedding, embedding, batch.lora)
        residual, scaled, squares = row_norm.start(embedded, layers[0].input_norm)
        rows = NormedRows(scaled, squares, eps)
        for i, layer in enumerate(layers):
            product, lora = layer.qkv, _lora(stacks[i].qkv, batch.lora)
            qkv = row_gemm.plain(
                rows, product.weight, product.bias, lora, self._workspace, dtype=torch.float32
            )  # rounded after the rotation
            rotated = torch.empty(qkv.shape, dtype=scaled.dtype, device=scaled.device)
            replace(decoder.rotary(layer, batch.positions), kv=kv_write(batch.spans, pages[i])).write(qkv, rotated)
            attended = attend(
                rotated, batch.spans, pages[i], heads, shape.head_dim, layer.window, arrivals=self._arrivals
            )  # fmt: skip
            post = NextNorm(layer.post_norm, eps)
            rows = self._added(NormedRows(attended), layer.o, stacks[i].o, batch.lora, residual, post)
            lora = _lora(stacks[i].gate_up, batch.lora)
            gated = row_gemm.gated(rows, layer.gate_up.weight, layer.gate_up.bias, lora, self._workspace)
            following = NextNorm(layers[i + 1].input_norm, eps) if i + 1 < len(layers) else None
            rows = self._added(NormedRows(gated), layer.down, stacks[i].down, batch.lora, residual, following)
        return residual

    def _added(
        self, rows: NormedRows, projection: Projection, stack: LinearStack | None, lora: LoraBatch, residual: Tensor,
        norm: NextNorm | None,
    ) -> NormedRows:  # fmt: skip
        own = _lora(stack, lora)
        return row_gemm.added(rows, projection.weight, projection.bias, own, self._workspace, residual, norm)


def supports(decoder: Decoder) -> bool:
    """Return whether `RowDecoder` serves a decoder, on its device and in its dtype."""
    shape = decoder.architecture
    widths = (width for dims in shape.module_dims().values() for width in dims)
    return shape.gemma is None and row_gemm.supports(decoder.embedding, widths)


def suits(lora: LoraBatch, hidden: int, rank: int, *, only_decodes: bool) -> bool:
    """Return whether `RowDecoder` takes less time than `Decoder`, by measurements on an H200 (`kernels/NOTES.md`).

    Args:
        lora: of the batch.
        hidden: width of the decoder.
        rank: of the slots.
    """
    if lora.backend != "none" and not lora.padded:
        return False
    if only_decodes and lora.rows <= _MOST_DECODES:
        return True
    is_short = lora.rows <= min(MOST_ROWS, _MOST_VALUES // hidden)
    return is_short and lora.padded and len(lora.tiles[0].runs) <= _MOST_ADAPTERS and rank <= _MOST_RANK


def _lora(stack: LinearStack | None, batch: LoraBatch) -> RowLora | None:
    if stack is None or not batch.tiles or not batch.reaches(stack):
        return None
    return RowLora(stack, batch.tiles[0], batch.terms_of(stack))
