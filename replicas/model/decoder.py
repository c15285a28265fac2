"""The decoder: computes the hidden states of packed tokens, with the LoRA adapters of the batch.

The residual stream is float32 for every dtype of the weights. With 28 layers, a bf16 stream would lower the cosine to a
float32 model from 0.99993 to 0.99983 and save only 2 % of the time.

Letters: T tokens of the batch, H hidden width, B sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import dispatch, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.kv_write import KvWrite
from ranklet.kernels.packs import PACKS
from ranklet.kernels.paged_spans import LayerPages
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import Architecture, layer_tables
from ranklet.replicas.model.attention import AttentionBatch, Spans, attend, last_rows
from ranklet.replicas.model.base_linears import BaseLinears
from ranklet.replicas.model.checkpoint import Checkpoint
from ranklet.replicas.model.lm_head import LmHead, read_lm_head
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, HEAD, module_path

StageCallback = Callable[[str], None]


def ignore_stage(stage: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The tensors of one packed batch."""

    ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], of each token in its sequence
    spans: Spans | AttentionBatch
    lora: LoraBatch
    last: LoraBatch | None = None  # one row a sequence; set if only the last tokens' states are needed


@dataclass(frozen=True, slots=True)
class Stacks:
    """The LoRA slots of one layer; None for a projection without slots."""

    qkv: LinearStack | None = None
    o: LinearStack | None = None
    gate_up: LinearStack | None = None
    down: LinearStack | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """One or more linear modules, packed into one weight."""

    weight: Tensor  # [N, K]
    bias: Tensor | None

    def __call__(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch) -> Tensor:
        return dispatch.linear(x, self.weight, self.bias, stack, lora)

    def rotated(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch, rotary: Rotary) -> Tensor:
        """Project to queries, keys and values, then apply `rotary`."""
        return dispatch.rotated(x, self.weight, self.bias, stack, lora, rotary)

    def gated(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch) -> Tensor:
        """Project to gate and up, then return `silu(gate) * up`."""
        return dispatch.gated(x, self.weight, self.bias, stack, lora)

    def gelu_gated(self, x: Tensor, stack: LinearStack | None, lora: LoraBatch) -> Tensor:
        """Project to gate and up, then return `gelu(gate) * up`, with the approximation of GELU by tanh."""
        gate, up = self(x, stack, lora).chunk(2, dim=1)
        return functional.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer.

    Attributes:
        input_norm, post_norm: of the inputs of attention and MLP.
        tables: cosines and sines by position, as in `Rotary`.
        output_norms: of the outputs of attention and MLP; only Gemma has them.
    """

    input_norm: Tensor
    qkv: Projection
    qk_norms: tuple[Tensor, Tensor] | None
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None
    tables: tuple[Tensor, Tensor]
    output_norms: tuple[Tensor, Tensor] | None = None


class Decoder:
    """A decoder of one of the supported families.

    Attributes:
        lm_head: the language-model head, which `forward` does not compute.
    """

    def __init__(
        self, architecture: Architecture, config: Any, model_dir: Path, max_len: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        if architecture.gemma is not None and device.type == "cuda":
            raise ModelError(
                f"architectures: {architecture.name} is served on the CPU only; expected device cpu, got {device}"
            )
        self.architecture = architecture
        self.device = device
        self.dtype = dtype
        with Checkpoint(model_dir, device, dtype) as checkpoint:
            padded = checkpoint.read_padded(f"{EMBED_TOKENS}.weight", (architecture.vocab, architecture.hidden))
            self.embedding = padded[: architecture.vocab]
            tables = layer_tables(config, architecture, max_len, device)
            self.layers = [_read_layer(checkpoint, architecture, i, each) for i, each in enumerate(tables)]
            self.norm = _read_norm(checkpoint, "norm", architecture.hidden, architecture)
            self.lm_head = read_lm_head(checkpoint, config, architecture, self.embedding, padded)
            checkpoint.check_all_read()

    def forward(
        self, batch: DeviceBatch, stacks: Sequence[Stacks], embedding: EmbeddingStack | None,
        on_stage: StageCallback = ignore_stage, pages: Sequence[LayerPages] | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the hidden states before the final norm.

        Args:
            batch: if `batch.last` is set, the last layer computes every key and value, but only the last query of each
                sequence.
            stacks: the LoRA slots of each layer.
            embedding: the LoRA slots of the token embedding.
            on_stage: called with a stage's name after the stage is launched, in every layer.
            pages: keys and values of each layer; None if all keys that the batch attends to are in the batch.

        Returns:
            float32 [T, H], or [B, H] if `batch.last` is set.
        """
        residual = dispatch.embedding(batch.ids, self.embedding, embedding, batch.lora).float()
        if self.architecture.gemma is not None:
            residual *= self.architecture.gemma.embedding
        on_stage("embed")
        normed = pointwise.rms_norm(residual, self.layers[0].input_norm, self.architecture.eps)
        on_stage("norm")
        lora, shape = batch.lora, self.architecture
        heads = (shape.heads, shape.kv_heads)
        for i, layer in enumerate(self.layers):
            narrow = batch.last if i + 1 == len(self.layers) else None
            own = None if pages is None else pages[i]
            rotary = replace(self.rotary(layer, batch.positions), kv=kv_write(batch.spans, own))
            qkv = layer.qkv.rotated(normed, stacks[i].qkv, batch.lora, rotary)
            on_stage("qkv")
            attended = attend(qkv, batch.spans, own, heads, shape.head_dim, layer.window, last=narrow is not None)
            on_stage("attention")
            if narrow is not None:
                residual, lora = residual[last_rows(batch.spans)], narrow
            delta = layer.o(attended, stacks[i].o, lora)
            if layer.output_norms is not None:
                delta = pointwise.rms_norm(delta, layer.output_norms[0], shape.eps)
            on_stage("o")
            normed = pointwise.add_rms_norm(delta, residual, layer.post_norm, self.architecture.eps)
            on_stage("norm")
            gate = layer.gate_up.gated if shape.gemma is None else layer.gate_up.gelu_gated
            gated = gate(normed, stacks[i].gate_up, lora)
            on_stage("gate_up")
            delta = layer.down(gated, stacks[i].down, lora)
            if layer.output_norms is not None:
                delta = pointwise.rms_norm(delta, layer.output_norms[1], shape.eps)
            on_stage("down")
            if i + 1 == len(self.layers):
                return residual.add_(delta)
            normed = pointwise.add_rms_norm(delta, residual, self.layers[i + 1].input_norm, self.architecture.eps)
            on_stage("norm")
        raise AssertionError("a decoder has at least one layer")

    def _linear(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a module, as views."""
        if layer == EMBEDDING:
            return self.embedding, None
        if layer == HEAD:
            assert isinstance(self.lm_head, LmHead), "only heads that are served have LoRA"
            return self.lm_head.weight, None
        pack = next(pack for pack, names in PACKS.items() if name in names)
        projection: Projection = getattr(self.layers[layer], pack)
        outs = [self.architecture.dims(each)[1] for each in PACKS[pack]]
        at = PACKS[pack].index(name)
        rows = slice(sum(outs[:at]), sum(outs[: at + 1]))
        return projection.weight[rows], None if projection.bias is None else projection.bias[rows]

    @property
    def linears(self) -> BaseLinears:
        first = self.layers[0]
        biased = (name for pack in PACKS for name in PACKS[pack] if getattr(first, pack).bias is not None)
        return BaseLinears(frozenset(biased), self._linear)

    def rotary(self, layer: Layer, positions: Tensor) -> Rotary:
        shape = self.architecture
        return Rotary(layer.qk_norms, *layer.tables, positions, shape.heads, shape.kv_heads, shape.eps)

    def final_norm(self, rows: Tensor) -> Tensor:
        """Normalize the rows that a head reads: float32 [R, H] -> [R, H]."""
        return pointwise.rms_norm(rows, self.norm, self.architecture.eps)


def kv_write(spans: Spans | AttentionBatch, pages: LayerPages | None) -> KvWrite | None:
    """Return where the keys and values of a layer are stored; None if they are not."""
    if pages is None or isinstance(spans, Spans) or spans.kv_slots is None:
        return None
    return KvWrite(spans.kv_slots, pages)


def _read_layer(checkpoint: Checkpoint, shape: Architecture, index: int, tables: tuple[Tensor, Tensor]) -> Layer:
    prefix = f"layers.{index}."

    def packed(pack: str) -> Projection:
        stored = (f"{pack}_proj",) if shape.fused else PACKS[pack]
        dims = map(shape.dims, stored)
        names = [prefix + module_path(name) for name in stored]
        return Projection(*checkpoint.read_packed(names, [(out, wide) for wide, out in dims]))

    qkv = packed("qkv")
    for columns in (qkv.weight, qkv.bias):
        if columns is not None:
            shape.order_heads(columns)

    def norm(name: str, width: int = shape.hidden) -> Tensor:
        return _read_norm(checkpoint, prefix + name, width, shape)

    norms = None
    if shape.qk_norm:
        norms = norm("self_attn.q_norm", shape.head_dim), norm("self_attn.k_norm", shape.head_dim)
    if norms is not None and shape.gemma is not None:
        norms[0].mul_(shape.gemma.query)
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=qkv,
        qk_norms=norms,
        o=packed("o"),
        post_norm=norm("post_attention_layernorm" if shape.gemma is None else "pre_feedforward_layernorm"),
        gate_up=packed("gate_up"),
        down=packed("down"),
        window=shape.windows[index],
        tables=tables,
        output_norms=None if shape.gemma is None else (norm(after[0]), norm(after[1])),
    )


def _read_norm(checkpoint: Checkpoint, name: str, width: int, shape: Architecture) -> Tensor:
    weight = checkpoint.read(f"{name}.weight", (width,))
    return weight if shape.gemma is None else weight + 1
