"""The decoder: packed tokens in, hidden states out, every LoRA of the batch applied on the way.

The residual stream is float32 whatever the weights' dtype: in bf16 its rounding alone takes the cosine to a float32
model below 0.9999 at 28 layers (0.99983, against 0.99993), for 2 % of the time.

Letters: T tokens of the batch end to end, H hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranklet.kernels import dispatch, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.packs import PACKS
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.replicas.model.architecture import Architecture, rotary_tables
from ranklet.replicas.model.attention import Spans, attend, attend_last
from ranklet.replicas.model.checkpoint import Checkpoint
from ranklet.replicas.model.modules import EMBED_TOKENS, module_path

StageCallback = Callable[[str], None]


def ignore_stage(stage: str) -> None:
    """Nobody asked where the time goes."""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """One batch on the device."""

    ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], from 0 in each request
    spans: Spans
    lora: LoraBatch
    last: LoraBatch | None = None  # of one row a request: the last token's state is all that is asked for


@dataclass(frozen=True, slots=True)
class Stacks:
    """The LoRA slots of one layer; None where the pool has no room for a projection."""

    qkv: LinearStack | None = None
    o: LinearStack | None = None
    gate_up: LinearStack | None = None
    down: LinearStack | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear projection, several modules packed into one weight."""

    weight: Tensor  # [N, K]
    bias: Tensor | None

    def __call__(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch) -> Tensor:
        return dispatch.linear(x, self.weight, self.bias, stack, lora)

    def rotated(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch, rotary: Rotary) -> Tensor:
        """The same for queries, keys and values, then `rotary`."""
        return dispatch.rotated(x, self.weight, self.bias, stack, lora, rotary)

    def gated(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch) -> Tensor:
        """The same for gate and up, then `silu(gate) * up`."""
        return dispatch.gated(x, self.weight, self.bias, stack, lora)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights."""

    input_norm: Tensor
    qkv: Projection
    qk_norms: tuple[Tensor, Tensor] | None
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None


class Decoder:
    """A Qwen3, Qwen2, Llama or Mistral decoder without its head."""

    def __init__(
        self, architecture: Architecture, config: Any, model_dir: Path, max_len: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.architecture = architecture
        self.device = device
        self.dtype = dtype
        with Checkpoint(model_dir, device, dtype) as checkpoint:
            self.embedding = checkpoint.read(f"{EMBED_TOKENS}.weight", (architecture.vocab, architecture.hidden))
            self.layers = [_read_layer(checkpoint, architecture, i) for i in range(architecture.layers)]
            self.norm = checkpoint.read("norm.weight", (architecture.hidden,))
            checkpoint.check_all_read()
        self._cos, self._sin = rotary_tables(config, architecture, max_len, device)

    def forward(
        self,
        batch: DeviceBatch,
        stacks: Sequence[Stacks],
        embedding: EmbeddingStack | None,
        on_stage: StageCallback = ignore_stage,
    ) -> Tensor:
        """Hidden states before the final norm: float32 [T, H], of the last token of each request if `batch.last`.

        Then the last layer computes what these need and no more: every key and value, but one query a request.
        `on_stage` is called behind each stage of each layer, with its name.
        """
        residual = dispatch.embedding(batch.ids, self.embedding, embedding, batch.lora).float()
        on_stage("embed")
        normed = pointwise.rms_norm(residual, self.layers[0].input_norm, self.architecture.eps)
        on_stage("norm")
        lora = batch.lora
        for i, layer in enumerate(self.layers):
            narrow = batch.last if i + 1 == len(self.layers) else None
            qkv = layer.qkv.rotated(normed, stacks[i].qkv, batch.lora, self.rotary(layer, batch.positions))
            on_stage("qkv")
            attended = self._attend(qkv, batch.spans, layer.window, last=narrow is not None)
            on_stage("attention")
            if narrow is not None:
                residual, lora = residual[batch.spans.offsets[1:] - 1], narrow
            delta = layer.o(attended, stacks[i].o, lora)
            on_stage("o")
            normed = pointwise.add_rms_norm(delta, residual, layer.post_norm, self.architecture.eps)
            on_stage("norm")
            gated = layer.gate_up.gated(normed, stacks[i].gate_up, lora)
            on_stage("gate_up")
            delta = layer.down(gated, stacks[i].down, lora)
            on_stage("down")
            if i + 1 == len(self.layers):
                return residual.add_(delta)
            normed = pointwise.add_rms_norm(delta, residual, self.layers[i + 1].input_norm, self.architecture.eps)
            on_stage("norm")
        raise AssertionError("a decoder has at least one layer")

    def _attend(self, qkv: Tensor, spans: Spans, window: int | None, *, last: bool) -> Tensor:
        shape, how = self.architecture, attend_last if last else attend
        return how(qkv, spans, (shape.heads, shape.kv_heads), shape.head_dim, window)

    def rotary(self, layer: Layer, positions: Tensor) -> Rotary:
        """What a layer does to queries and keys at these positions, int32 [T]."""
        shape = self.architecture
        return Rotary(layer.qk_norms, self._cos, self._sin, positions, shape.heads, shape.kv_heads, shape.eps)

    def final_norm(self, rows: Tensor) -> Tensor:
        """The final norm, on the rows that pooling kept: float32 [R, H] -> [R, H]."""
        return pointwise.rms_norm(rows, self.norm, self.architecture.eps)


def _read_layer(checkpoint: Checkpoint, shape: Architecture, index: int) -> Layer:
    prefix = f"layers.{index}."

    def packed(pack: str) -> Projection:
        dims = [shape.module_dims()[name] for name in PACKS[pack]]
        names = [prefix + module_path(name) for name in PACKS[pack]]
        return Projection(*checkpoint.read_packed(names, [(out, wide) for wide, out in dims]))

    norms = None
    if shape.qk_norm:
        width = (shape.head_dim,)
        norms = (
            checkpoint.read(f"{prefix}self_attn.q_norm.weight", width),
            checkpoint.read(f"{prefix}self_attn.k_norm.weight", width),
        )
    return Layer(
        input_norm=checkpoint.read(f"{prefix}input_layernorm.weight", (shape.hidden,)),
        qkv=packed("qkv"),
        qk_norms=norms,
        o=packed("o"),
        post_norm=checkpoint.read(f"{prefix}post_attention_layernorm.weight", (shape.hidden,)),
        gate_up=packed("gate_up"),
        down=packed("down"),
        window=shape.windows[index],
    )
