"""Runs steps of the model on the device: packs each step, launches it and copies its outputs to the host.

Letters: B sequences of the step.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from time import perf_counter

import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch, plan
from ranklet.kernels.cost_model import LoraLayer
from ranklet.kernels.crossover import crossovers, scope_of, surface
from ranklet.kernels.dispatch import Backends
from ranklet.kernels.row_subset import one_each
from ranklet.kernels.segments import runs_of
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.bucket import Bucket, is_full
from ranklet.replicas.engine.cuda_graphs import GraphCache
from ranklet.replicas.engine.launched import SKIPPED, LaunchedStep, OutputGroup, record_event, to_host
from ranklet.replicas.engine.layout import Layout, TokenSpan
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.attention import Spans, reads_lengths_on_device
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, StageCallback, ignore_stage
from ranklet.replicas.model.heads import Head, PoolingHead, PromptHead

_REPLAYED_TOKENS = 16_384  # launching a larger step takes Python less time than running it takes the device


class Runner:
    """Launches the steps of one model on one device.

    Attributes:
        max_tokens: tokens of the largest step.
        backend: LoRA backend: "auto", "fastest" or a backend's name.
        graphs: CUDA graphs of steps; None launches every kernel from Python, as on the CPU.
        pads: whether steps are padded to buckets, so that steps of different lengths share a graph. On CUDA, whether
            attention reads lengths on the device.
        pads_pages: the same, for steps with pages.
    """

    def __init__(self, model: Decoder, pool: AdapterPool, config: EngineConfig) -> None:
        self.model = model
        self.pool = pool
        self.max_tokens = config.max_batch_tokens
        self.backend = config.backend
        self._cuda = model.device.type == "cuda"
        self.graphs = GraphCache(model.device) if self._cuda else None
        self.pads, self.pads_pages = config.padded_steps, config.padded_steps
        if self.graphs is not None:
            self.pads = reads_lengths_on_device(model.device, model.dtype, model.architecture.windows)
            self.pads_pages = True
        self.uses_cudnn = cudnn_attention.is_available(model.device) and model.dtype in (torch.bfloat16, torch.float16)
        known = crossovers(model.embedding.device.index)
        measured = surface(known, scope_of(pool.projections), pool.architecture.hidden)
        layer = LoraLayer(pool.projections, pool.rank, self._cuda, measured)
        self.backends = Backends(layer, config.merged_bytes)

    @torch.inference_mode()
    def launch(
        self, spans: Sequence[TokenSpan], slots: Sequence[int | None], on_stage: StageCallback | None = None
    ) -> LaunchedStep:
        """Start a step. On CUDA it returns while the device works.

        Args:
            slots: pool slot of each span's adapter; None for the base model.
            on_stage: see `Decoder.forward`. A step with a callback is neither padded nor replayed from a graph.
        """
        launched_s = perf_counter()
        order, lora = plan([len(span.ids) for span in spans], slots)
        lora = self.choose_backend(lora)
        self.backends.merged.observe(lora)
        heads = distinct_heads(span.head for span in spans)
        pads = self.pads and lora.backend in ("csgmv", "none")
        replays = lora.rows <= _REPLAYED_TOKENS or (pads and is_full(lora.rows, self.max_tokens))
        replays = replays and on_stage is None
        layout = self.lay_out([spans[i] for i in order], lora, heads, padded=pads and replays)
        began = record_event(self.model.device)
        outputs = self._run(layout, heads, self.graphs if replays else None, on_stage or ignore_stage)
        groups = []
        for head, output in zip(heads, outputs, strict=True):
            members = [i if spans[i].head is head else SKIPPED for i in order]
            groups.append(OutputGroup(head, members, (to_host(output[: len(spans)]),)))
        events = (began, record_event(self.model.device)) if self._cuda else None
        return LaunchedStep(groups, lora.backend, launched_s, perf_counter() - launched_s, events)

    def choose_backend(self, lora: LoraBatch) -> LoraBatch:
        """Set the backend of a step, and whether its adapters have column terms or rows of tokens."""
        contents = [self.pool.contents[slot] for slot in runs_of(lora.segments)[:, 2].tolist()]
        if any(each.terms for each in contents):
            lora = replace(lora, terms=True)
        if any(each.rows for each in contents):
            more_ids = self.pool.added_tokens if any(each.more_ids for each in contents) else 0
            lora = replace(lora, token_rows=self.pool.rows.table, more_ids=more_ids)
        return self.backends.choose(lora, self.backend)

    def lay_out(
        self, spans: Sequence[TokenSpan], lora: LoraBatch, heads: tuple[PromptHead, ...], *, padded: bool
    ) -> Layout:
        bucket = Bucket.of([len(span.ids) for span in spans], self.max_tokens) if padded else None
        choose_last = self._choose_last if all(head.reads_last for head in heads) else None
        return Layout.pack(spans, lora, choose_last, bucket, pinned=self._cuda)

    def _choose_last(self, lora: LoraBatch, lengths: Sequence[int]) -> LoraBatch:
        last = one_each(lora, lengths)
        # Merging weights does not pay for one row a sequence.
        return self.backends.choose(last) if lora.backend == "merged" else last

    def _run(
        self, layout: Layout, heads: tuple[PromptHead, ...], graphs: GraphCache | None, on_stage: StageCallback
    ) -> tuple[Tensor, ...]:
        key = self.graph_key(layout, heads) if graphs is not None else None
        if key is None or graphs is None:
            moved = layout.buffer.to(self.model.device, non_blocking=True)
            return self.forward(layout, heads, on_stage, moved)
        return graphs.run(key, layout.buffer, partial(self.forward, layout, heads, on_stage))

    def forward(
        self, layout: Layout, heads: tuple[PromptHead, ...], on_stage: StageCallback, moved: Tensor
    ) -> tuple[Tensor, ...]:
        arrays = layout.unpack(moved)
        shape, cudnn = self.model.architecture, None
        if self.uses_cudnn:
            size = (shape.heads, shape.kv_heads)
            cudnn = cudnn_attention.cudnn_spans(arrays.offsets, len(layout.lengths), size, shape.head_dim)
        spans = Spans(layout.lengths, arrays.offsets, layout.longest, cudnn, skipped=arrays.skipped)
        batch = DeviceBatch(arrays.ids, arrays.positions, spans, arrays.lora, arrays.last)
        on_stage("begin")
        states = self.model.forward(batch, self.pool.layers, self.pool.embedding, on_stage)
        outputs = tuple(self._finish(head, states, spans, only_last=arrays.last is not None) for head in heads)
        on_stage("pool")
        return outputs

    def _finish(self, head: PromptHead, states: Tensor, spans: Spans, *, only_last: bool) -> Tensor:
        return head.finish(self.model.final_norm(states if only_last else head.rows(states, spans)), spans)

    def graph_key(self, layout: Layout, heads: tuple[PromptHead, ...]) -> Hashable | None:
        """Return all facts that kernel launches depend on, apart from device memory; None if no graph can be reused.

        A graph of `csgmv`, which reads lengths, slots and ranks on the device, serves every step of the bucket whose
        adapters target the same modules. A graph of `native`, whose launches contain lengths, slots and ranks, serves
        only the same lengths and adapters. `merged` frees and allocates memory between steps, so it has no graphs.
        """
        lora = layout.lora
        # Where steps are not padded, attention reads the lengths on the host.
        bucket = (lora.rows, len(layout.lengths), layout.longest) if self.pads else layout.lengths
        contents = [self.pool.contents[segment.slot] for segment in lora.segments]
        if lora.backend == "csgmv":
            modules = frozenset().union(*(slot.modules for slot in contents))
            return heads, bucket, layout.tile_shapes, modules, lora.variant
        if lora.backend == "native":
            return heads, layout.lengths, tuple(lora.segments), tuple(contents)
        return (heads, bucket) if lora.backend == "none" else None

    def free_caches(self) -> None:
        """Free the device memory of CUDA graphs and merged weights."""
        self.backends.merged.drop()
        if self.graphs is not None:
            self.graphs.clear()
        if self._cuda:
            torch.cuda.empty_cache()


def distinct_heads(heads: Iterable[Head | None]) -> tuple[PoolingHead, ...]:
    """Return the heads of a step that draws no tokens, in an order that does not depend on that of its spans."""
    return tuple(sorted(dict.fromkeys(map(_pooling_head, heads)), key=attrgetter("rank")))


def _pooling_head(head: Head | None) -> PoolingHead:
    assert isinstance(head, PoolingHead), "only steps with pages draw tokens"
    return head
