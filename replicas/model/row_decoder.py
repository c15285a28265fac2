"""A decoder's forward pass for a step that makes one token a sequence, with few launches.

`Decoder.forward` serves every batch. `RowDecoder` serves short batches on a Hopper GPU: the products of `row_gemm.py`
include norms, adapters, activation and residual stream. Keys and values are in pages.

Letters as in `decoder.py`; B sequences, one token each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ranklet.kernels import dispatch, paged_attention, row_gemm, row_norm
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.kv_write import KvWrite
from ranklet.kernels.paged_spans import LayerPages, PagedSpans
from ranklet.kernels.row_gemm import NextNorm, NormedRows, RowLora, Workspace
from ranklet.kernels.row_gemm_tiles import MOST_ROWS
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.replicas.model.decoder import Decoder, Projection, Stacks


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The tensors of a step that makes one token a sequence."""

    ids: Tensor  # int32 [B]
    positions: Tensor  # int32 [B]
    spans: PagedSpans  # of one token each
    kv_slots: Tensor  # int32 [B], as in `KvWrite`
    lora: LoraBatch  # its tiles are padded and on the device


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
        self, batch: RowBatch, pages: Sequence[LayerPages], stacks: Sequence[Stacks], embedding: EmbeddingStack | None
    ) -> Tensor:
        """Compute the hidden states before the final norm, and store the tokens' keys and values.

        Args:
            batch: of at most `MOST_ROWS` rows.
            pages: the keys and values of each layer.
            stacks: the LoRA slots of each layer.
            embedding: the LoRA slots of the token embedding.

        Returns:
            float32 [B, H].
        """
        decoder, shape = self._decoder, self._decoder.architecture
        layers, eps, heads = decoder.layers, shape.eps, (shape.heads, shape.kv_heads)
        embedded = dispatch.embedding(batch.ids, decoder.embedding, embedding, batch.lora)
        residual, scaled, squares = row_norm.start(embedded, layers[0].input_norm)
        rows = NormedRows(scaled, squares, eps)
        attended = torch.empty((len(scaled), heads[0] * shape.head_dim), dtype=scaled.dtype, device=scaled.device)
        for i, layer in enumerate(layers):
            product, lora = layer.qkv, _lora(stacks[i].qkv, batch.lora)
            qkv = row_gemm.plain(
                rows, product.weight, product.bias, lora, self._workspace, dtype=torch.float32
            )  # rounded after the rotation
            rotated = torch.empty(qkv.shape, dtype=scaled.dtype, device=scaled.device)
            rotary = replace(decoder.rotary(layer, batch.positions), kv=KvWrite(batch.kv_slots, pages[i]))
            rotary.write(qkv, rotated)
            paged_attention.decode(rotated, batch.spans, pages[i], heads, layer.window, attended, self._arrivals)
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


def _lora(stack: LinearStack | None, batch: LoraBatch) -> RowLora | None:
    return RowLora(stack, batch.tiles[0], batch.terms_of(stack)) if stack is not None and batch.tiles else None
