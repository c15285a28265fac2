"""Causal grouped-query attention by cuDNN, which is about twice as fast on Hopper as torch's varlen kernel.

cuDNN builds a graph for a fixed number of sequences and a fixed longest length. Both are rounded up to powers of two;
the added sequences have length 0. Based on cudnn-frontend's ragged SDPA sample.

Letters: T tokens, Q query heads, G key heads, D head width, B sequences.
"""

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranklet.kernels.launch import is_hopper
from ranklet.kernels.powers import power_of_two

logger = logging.getLogger(__name__)

MIN_LONGEST = 128  # the smallest longest length that a graph is built for
_INT32_MAX = 2**31 - 1


class _GraphShape(NamedTuple):
    sequences: int
    longest: int
    queries: int
    keys: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class CudnnSpans:
    """Where each sequence begins and ends, in the form that cuDNN reads. P sequences, a power of two."""

    qkv_offsets: Tensor  # int32 [P + 1]: elements of the packed q, k and v before each sequence
    out_offsets: Tensor  # int32 [P + 1]: elements of the output before each sequence
    lengths: Tensor  # int32 [P]


@dataclass(frozen=True, slots=True)
class _AttentionGraph:
    graph: Any
    q: Any
    k: Any
    v: Any
    qkv_offsets: Any
    out_offsets: Any
    lengths: Any
    out: Any
    workspace_bytes: int


def is_available(device: torch.device) -> bool:
    """Whether cuDNN's frontend is installed and the GPU is Hopper or later, where cuDNN is faster."""
    return is_hopper(device) and _module() is not None


@cache
def _module() -> Any:
    try:
        import cudnn
    except (ImportError, OSError, RuntimeError) as error:
        logger.info("cuDNN frontend unavailable (%s); attention uses torch's varlen kernel", error)
        return None
    return cudnn


def cudnn_spans(
    offsets: Tensor, sequences: int, heads: tuple[int, int], width: int, starts: Tensor | None = None
) -> CudnnSpans:
    """Convert offsets, int32 [B + 1]. Appends sequences of length 0 up to a power of two.

    Args:
        starts: int32 [B]: first packed token of each sequence; None if they lie side by side.
    """
    queries, keys = heads
    missing = power_of_two(sequences) - sequences
    padded = torch.cat((offsets, offsets[-1:].expand(missing))) if missing else offsets
    firsts = padded if starts is None else torch.cat((starts, starts[-1:].expand(missing + 1)))
    return CudnnSpans(firsts * ((queries + 2 * keys) * width), firsts * (queries * width), padded.diff())


def build_graphs(
    device: torch.device, sequences: int, longest: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    """Build and run the graph of every batch size up to these limits. Each takes about 40 ms."""
    queries, keys = heads
    qkv = torch.zeros(1, (queries + 2 * keys) * width, dtype=dtype, device=device)
    for powers in range(power_of_two(sequences).bit_length()):
        nothing = torch.zeros((1 << powers) + 1, dtype=torch.int32, device=device)
        for more in range((power_of_two(max(longest, MIN_LONGEST)) // MIN_LONGEST).bit_length()):
            attend(qkv, CudnnSpans(nothing, nothing, nothing[1:]), MIN_LONGEST << more, heads, width)


def attend(
    qkv: Tensor, spans: CudnnSpans, longest: int, heads: tuple[int, int], width: int, out: Tensor | None = None
) -> Tensor | None:
    """Compute causal attention within each sequence.

    Args:
        qkv: [T, (Q + 2 G) * D], bfloat16 or float16.
        longest: upper bound on the lengths.
        heads: (Q, G).
        width: D.
        out: [T, Q * D]; rows of no sequence are kept. None for a new tensor.

    Returns:
        `out`, or None if cuDNN does not support the shape. The reason is logged once.
    """
    queries, keys = heads
    tokens, row = qkv.shape
    if tokens * row > _INT32_MAX:
        return None
    shape = _GraphShape(len(spans.lengths), power_of_two(max(longest, MIN_LONGEST)), queries, keys, width, qkv.dtype)
    graphs = _graphs_of(qkv.device)
    graph = graphs.get(shape)
    if graph is None:
        return None
    if out is None:
        out = torch.empty(tokens, queries * width, dtype=qkv.dtype, device=qkv.device)
    workspace = torch.empty(graph.workspace_bytes, dtype=torch.uint8, device=qkv.device)
    step = width * qkv.element_size()
    graphs.run(
        graph,
        {
            graph.q: qkv.data_ptr(), graph.k: qkv.data_ptr() + queries * step,
            graph.v: qkv.data_ptr() + (queries + keys) * step, graph.out: out.data_ptr(),
            graph.qkv_offsets: spans.qkv_offsets.data_ptr(), graph.out_offsets: spans.out_offsets.data_ptr(),
            graph.lengths: spans.lengths.data_ptr(),
        },
        workspace,
    )  # fmt: skip
    return out


@cache
def _graphs_of(device: torch.device) -> "_DeviceGraphs":
    return _DeviceGraphs(device)


class _DeviceGraphs:
    """cuDNN's handle of one device, and its graphs by shape."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle = _module().create_handle()
        self._graphs: dict[Hashable, _AttentionGraph | None] = {}
        self._lock = threading.Lock()

    def get(self, shape: _GraphShape) -> _AttentionGraph | None:
        with self._lock:
            if shape not in self._graphs:
                try:
                    self._graphs[shape] = self._build(shape)
                except Exception as error:  # the only base class of cuDNN's errors
                    logger.warning("cuDNN does not support attention of %s: %s", shape, error)
                    self._graphs[shape] = None
            return self._graphs[shape]

    def run(self, graph: _AttentionGraph, pointers: dict[Any, int], workspace: Tensor) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _module().set_stream(handle=self._handle, stream=stream)
        graph.graph.execute(pointers, workspace.data_ptr(), handle=self._handle)

    def _build(self, shape: _GraphShape) -> _AttentionGraph:
        cudnn = _module()
        sequences, longest, queries, keys, width, dtype = shape
        kind = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
        graph = cudnn.pygraph(
            io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )  # fmt: skip
        row = (queries + 2 * keys) * width

        def integers(name: str, count: int) -> Any:
            return graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=cudnn.data_type.INT32)

        qkv_offsets, out_offsets = integers("qkv_offsets", sequences + 1), integers("out_offsets", sequences + 1)
        lengths = integers("lengths", sequences)

        def heads(name: str, count: int) -> Any:
            made = graph.tensor(
                name=name, dim=[sequences, count, longest, width], stride=[longest * row, width, row, 1], data_type=kind
            )
            made.set_ragged_offset(qkv_offsets)
            return made

        q, k, v = heads("q", queries), heads("k", keys), heads("v", keys)
        out, _ = graph.sdpa(
            name="attention", q=q, k=k, v=v, generate_stats=False, attn_scale=width**-0.5, use_causal_mask=True,
            use_padding_mask=True, seq_len_q=lengths, seq_len_kv=lengths,
        )  # fmt: skip
        out.set_output(True).set_dim([sequences, queries, longest, width])
        out.set_stride([longest * queries * width, width, queries * width, 1])
        out.set_ragged_offset(out_offsets)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return _AttentionGraph(graph, q, k, v, qkv_offsets, out_offsets, lengths, out, graph.get_workspace_size())
