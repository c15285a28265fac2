"""Runs the steps that read or write pages of keys and values: text, and prompts beside it."""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.paged_attention import group_limit
from ranklet.kernels.row_subset import subset
from ranklet.kernels.segments import runs_of
from ranklet.replicas.cache.tensors import KvPages
from ranklet.replicas.engine.launched import SKIPPED, LaunchedStep, OutputGroup, record_event, to_host
from ranklet.replicas.engine.paged_layout import LayoutPacker, PagedArrays, PagedLayout, StepItems
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.planned_spans import PlannedSpans
from ranklet.replicas.engine.repeated_layout import RepeatedLayout
from ranklet.replicas.engine.row_table import RowTable
from ranklet.replicas.engine.runner import Runner, distinct_heads
from ranklet.replicas.engine.scored_span import ScoredSpan
from ranklet.replicas.model import cudnn_attention, row_decoder
from ranklet.replicas.model.attention import AttentionBatch, Spans
from ranklet.replicas.model.decoder import DeviceBatch
from ranklet.replicas.model.heads import PoolingHead, PoolingHeads, ScoringHead, TextHead
from ranklet.replicas.model.modules import EMBEDDING, Module
from ranklet.replicas.model.prompt_logprobs import prompt_logprobs
from ranklet.replicas.model.row_decoder import RowDecoder, suits

_REPLAYED_TOKENS = 8192  # sizes of larger steps vary too much to recur, except the largest


_Scores = tuple[int, ScoringHead, tuple[Tensor, ...]]  # item of the step, head, its outputs


class PagedRunner:
    """Launches the steps with pages of one model on one device.

    Args:
        heads: of embeddings that run beside text.

    Attributes:
        table: the rows of the sequences with pages.
        text: the head that draws tokens.
        packer: packs the steps.
        last_token: int32 [R + 1]: the last token that was drawn for each row, which the next decode computes.
    """

    def __init__(self, runner: Runner, kv: KvPages, table: RowTable, text: TextHead, heads: PoolingHeads) -> None:
        self.runner = runner
        self.table = table
        self.text = text
        self._usual_heads = (heads.last,)
        model = runner.model
        self._pages = [kv.layer(i) for i in range(model.architecture.layers)]
        self._cuda = model.device.type == "cuda"
        self.packer = LayoutPacker(
            table, max_tokens=runner.max_tokens, pads=runner.pads_pages, pinned=self._cuda,
            adapts_head=runner.pool.head is not None,
            group_limit=group_limit((model.architecture.heads, model.architecture.kv_heads)),
        )  # fmt: skip
        self._rows = RowDecoder(model) if row_decoder.supports(model) else None
        self._repeated: RepeatedLayout | None = None  # of the last step that had decodes only
        self.last_token = torch.zeros(table.filler + 1, dtype=torch.int32, device=model.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, slots: Sequence[int | None]) -> LaunchedStep:
        """Start a committed step. On CUDA it returns while the device works.

        Args:
            slots: pool slot of the adapter of each of `plan.parts`; None for the base model.
        """
        launched_s = perf_counter()
        for sequence in plan.started:
            if sequence.sampling is not None and sequence.row is not None:
                ids = sequence.ids
                self.text.sampler.begin(sequence.row, sequence.sampling, ids[: sequence.prompt], ids[sequence.prompt :])
        masks = {each.row: each.grammar.allowed for each in plan.drawing() if each.grammar and each.row is not None}
        if masks:
            self.text.sampler.set_masks(list(masks), list(masks.values()))
        planned = PlannedSpans.of(plan, slots)
        launched = self.launch_items(StepItems(plan.decode_set.rows, planned.spans, planned.slots), launched_s)
        return planned.by_part(launched, len(plan.decodes))

    @torch.inference_mode()
    def launch_items(self, items: StepItems, launched_s: float) -> LaunchedStep:
        """Start a step of sequences whose rows are set up; see `launch`."""
        runner = self.runner
        layout = self._repeated.next(items) if self._repeated is not None else None
        if layout is None:
            layout = self._pack(items)
        self.text.sampler.prepare(layout.features)
        began = record_event(runner.model.device)
        outputs, scores = self._run(layout)
        groups, heads = [], self._pooling_heads(layout)
        first_pooled = len(outputs) - len(heads)
        if layout.drawn_items:
            groups.append(OutputGroup(self.text, layout.drawn_items, tuple(map(to_host, outputs[:first_pooled]))))
        if layout.pooled_items:
            pairs = list(zip(layout.pooled_items, layout.pooled_heads, strict=True))
            for head, pooled in zip(heads, outputs[first_pooled:], strict=True):
                members = [item if own is head else SKIPPED for item, own in pairs]
                groups.append(OutputGroup(head, members, (to_host(pooled),)))
        groups += [OutputGroup(head, [item], tuple(map(to_host, arrays))) for item, head, arrays in scores]
        events = (began, record_event(runner.model.device)) if self._cuda else None
        return LaunchedStep(groups, layout.lora.backend, launched_s, perf_counter() - launched_s, events)

    def _pack(self, items: StepItems) -> PagedLayout:
        order, lora = items.lora(self.table)
        lora = self.runner.choose_backend(lora)
        layout = self.packer.pack(items, order, lora)
        self._repeated = None if items.spans else RepeatedLayout(self.table, items, layout)
        return layout

    def _run(self, layout: PagedLayout) -> tuple[tuple[Tensor, ...], list[_Scores]]:
        graphs = self.runner.graphs
        replays = layout.sizes.tokens <= _REPLAYED_TOKENS or layout.sizes.tokens == self.runner.max_tokens
        replays &= layout.lora.backend in ("csgmv", "none")
        if graphs is None or layout.scored or not replays:
            moved = layout.buffer.to(self.runner.model.device, non_blocking=True)
            arrays, states = self._states(layout, moved)
            return self._outputs(layout, arrays, states), [
                (span.item, ScoringHead(span.start), self._score(span, arrays.lora, states)) for span in layout.scored
            ]

        def forward(moved: Tensor) -> tuple[Tensor, ...]:
            return self._outputs(layout, *self._states(layout, moved))

        return graphs.run(self.graph_key(layout), layout.buffer, forward), []

    def graph_key(self, layout: PagedLayout) -> Hashable:
        """Return all facts that kernel launches depend on, apart from device memory."""
        pool, drawn = self.runner.pool, layout.drawn_lora
        # Equal adapters share their set of modules, and a set's hash is computed once.
        distinct = {pool.contents[slot].modules for slot in _slots(layout.lora)}
        modules = _modules(frozenset(distinct), in_layers=not layout.lora.everywhere)
        # Tokens may be drawn for some of the adapters only.
        adapts_head = pool.head is not None and drawn is not None and pool.head.holds_any(_slots(drawn))
        heads = self._pooling_heads(layout)
        on_host = None if self.runner.pads else layout.fresh_lengths  # what attention reads there
        lora = (layout.lora.backend, layout.lora.variant, modules, adapts_head)
        rows = self._suits_rows(layout)
        return "pages", layout.sizes, on_host, heads, layout.tile_shapes, layout.features, lora, rows

    def _states(self, layout: PagedLayout, moved: Tensor) -> tuple[PagedArrays, Tensor]:
        """Compute the hidden states of a step from its buffer on the device."""
        model, pool = self.runner.model, self.runner.pool
        arrays = layout.unpack(moved)
        ids = arrays.ids
        if layout.sizes.decodes:
            ids = torch.where(ids < 0, self.last_token[(-1 - ids).clamp(min=0)], ids)
        batch = DeviceBatch(ids, arrays.positions, self._attention(layout, arrays), arrays.lora)
        if self._rows is not None and self._suits_rows(layout):
            return arrays, self._rows.forward(batch, pool.layers, pool.embedding, self._pages)
        return arrays, model.forward(batch, pool.layers, pool.embedding, pages=self._pages)

    def _suits_rows(self, layout: PagedLayout) -> bool:
        # Vectors of any steps are nearer to each other if all are computed by `Decoder`.
        hidden, rank = self.runner.model.architecture.hidden, self.runner.pool.rank
        return not layout.pooled_items and suits(layout.lora, hidden, rank, only_decodes=layout.only_decodes)

    def _outputs(self, layout: PagedLayout, arrays: PagedArrays, states: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of drawn tokens, then the pooled vectors."""
        model, pool = self.runner.model, self.runner.pool
        outputs: tuple[Tensor, ...] = ()
        if layout.sizes.drawn:
            rows = model.final_norm(states[arrays.drawn])
            outputs = self.text.draw(
                rows, arrays.drawn_lora, pool.head, arrays.columns, layout.features, self.last_token
            )
        if layout.sizes.pooled:
            pooled = model.final_norm(states[arrays.pooled]).float()
            outputs += tuple(head.pooling.normalized(pooled) for head in self._pooling_heads(layout))
        return outputs

    def _pooling_heads(self, layout: PagedLayout) -> tuple[PoolingHead, ...]:
        """Return the heads of the pooled outputs, fillers included."""
        if not layout.sizes.pooled:
            return ()
        heads = distinct_heads(layout.pooled_heads) if layout.pooled_heads else self._usual_heads
        assert all(head.reads_last for head in heads), "the scheduler computes other prompts in steps without pages"
        return heads

    def _score(self, span: ScoredSpan, lora: LoraBatch, states: Tensor) -> tuple[Tensor, ...]:
        """Compute the logprobs of tokens of a prompt."""
        model, head = self.runner.model, self.runner.pool.head
        rows = np.arange(span.first, span.first + len(span.tokens))
        targets = torch.from_numpy(span.tokens).to(states.device)
        found = prompt_logprobs(
            self.text.lm_head, model.final_norm(states[span.first : span.first + len(span.tokens)]), targets, span.top,
            head, subset(lora, rows) if head is not None or lora.token_rows is not None else None,
        )  # fmt: skip
        return tuple(array for array in found if array is not None)

    def _attention(self, layout: PagedLayout, arrays: PagedArrays) -> AttentionBatch:
        fresh, sizes = None, layout.sizes
        if sizes.fresh:
            shape, cudnn = self.runner.model.architecture, None
            # Without other spans they lie side by side.
            starts = arrays.fresh_starts if arrays.chunks or arrays.decodes else None
            if self.runner.uses_cudnn:
                cudnn = cudnn_attention.cudnn_spans(
                    arrays.fresh_offsets, sizes.fresh, (shape.heads, shape.kv_heads), shape.head_dim, starts
                )
            fresh = Spans(layout.fresh_lengths, arrays.fresh_offsets, sizes.longest_fresh, cudnn, starts)
        return AttentionBatch(fresh, arrays.chunks, arrays.decodes, arrays.kv_slots)


def _slots(lora: LoraBatch) -> list[int]:
    slots: list[int] = runs_of(lora.segments)[:, 2].tolist()
    return slots


@lru_cache(256)
def _modules(distinct: frozenset[frozenset[Module]], *, in_layers: bool) -> frozenset[Module]:
    """Return the modules of all adapters but the head, without those in the layers unless `in_layers`."""
    return frozenset(
        module for modules in distinct for module in modules if module[0] == EMBEDDING or (in_layers and module[0] >= 0)
    )
