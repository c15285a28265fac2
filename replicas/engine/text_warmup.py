"""Compiles kernels of text and captures the CUDA graphs of its usual steps, before an engine takes requests.

Afterwards a step of decodes that are greedy or sample without penalties, biases and logprobs never runs eagerly, if
adapters have modules in the layers only. Nor does a step of up to 2,048 tokens with up to 16 pieces of prompts. Steps
with column terms (DoRA, biases) run eagerly once, with kernels that are compiled here, as do vectors in steps that
`RowDecoder` would compute without them.
"""

import logging
from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from ranklet.kernels.paged_spans import PAGE_TOKENS
from ranklet.kernels.row_tiles import padded_runs
from ranklet.kernels.sampling_row import CHANGING, ROW_WIDTH, Feature
from ranklet.replicas.engine.bucket import rounded_pages, rounded_rows, rounded_step
from ranklet.replicas.engine.cuda_graphs import NEVER
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import SHORT_STEP, StepItems, decodes_beside_prompts
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.step_cost import MOST_TEXT_TOKENS
from ranklet.replicas.engine.warmup import compiled_ahead

_LARGE_TOKENS = (1100, 3000, 5000)  # of steps that are launched for their kernels
_FEW_PROMPTS = 16
_PROMPTS = (17, 65, 257)  # with more, attention of pieces has other kernels
_FEATURES = (
    Feature.NOISE | Feature.TRUNCATE,
    Feature.NOISE | Feature.TRUNCATE | Feature.LOGPROB | Feature.TOP,
    Feature.NOISE | Feature.TRUNCATE | CHANGING,
    Feature.NOISE | Feature.TRUNCATE | CHANGING | Feature.LOGPROB | Feature.TOP,
)

logger = logging.getLogger(__name__)


class WarmupStep(NamedTuple):
    """A step of the warm-up.

    Attributes:
        pages: of the longest decoding sequence.
        tokens: of prompts.
        captured: whether its graph is kept.
        is_new: whether it has kernels that the steps before do not have.
        prompts: number of prompts, if there are tokens of them.
    """

    decodes: int
    pages: int
    adapters: int
    tokens: int
    captured: bool
    is_new: bool = True
    prompts: int = 1


def compile_text_kernels(paged: PagedRunner, longest: int) -> None:
    """Compile the kernels of text. The numbers of pages and rows may be others than those of the engine.

    Does nothing on the CPU, nor in float32, which serves only comparisons.

    Args:
        longest: tokens of the longest sequence.
    """
    runner, graphs = paged.runner, paged.runner.graphs
    if runner.model.dtype == torch.float32 or graphs is None:
        return
    with compiled_ahead(runner), graphs.capturing_after(NEVER):
        _sample(paged)  # first, because the kernels that take longest to compile are the sampler's
        for terms in (False, True):
            with runner.pool.placeholder_adapters(in_layers=True, terms=terms):
                for step in text_steps(paged, longest):
                    if step.is_new and (step.adapters or not terms):
                        run_step(paged, step, longest)
                        paged.last_token.zero_()  # the sampler's kernels may have written any tokens
    _sample(paged)


def warm_up_text(paged: PagedRunner, longest: int) -> None:
    """Launch the kernels of text and capture graphs, after `compile_text_kernels`, where that does something."""
    runner, graphs, began_s = paged.runner, paged.runner.graphs, perf_counter()
    if runner.model.dtype == torch.float32 or graphs is None:
        return
    with runner.pool.placeholder_adapters(in_layers=True):
        for step in text_steps(paged, longest):
            if step.is_new:
                with graphs.capturing_after(NEVER):
                    run_step(paged, step, longest)
            if step.captured:
                with graphs.capturing_after(0):
                    run_step(paged, step, longest)
    graphs.keep_all()
    logger.info("captured %d graphs of text in %.1f s", len(graphs), perf_counter() - began_s)


def text_steps(paged: PagedRunner, longest: int) -> Iterator[WarmupStep]:
    """Yield steps that launch all kernels of text, and those whose graphs are captured."""
    rows, slots = paged.table.filler, paged.runner.pool.slots
    largest, most = paged.runner.max_tokens, paged.table.pages.shape[1]
    for size in sorted({rounded_rows(count) for count in range(1, min(rows, largest) + 1)}):
        widths = sorted({rounded_pages(size, pages, most) for pages in range(1, most + 1)})
        count = min(size, rows, largest)
        for adapters in _adapter_counts(min(slots, count), size):
            for width in widths:
                yield WarmupStep(count, width, adapters, 0, captured=True, is_new=width == widths[0])
    for size in sorted({rounded_step(tokens, largest) for tokens in range(1, min(MOST_TEXT_TOKENS, largest) + 1)}):
        beside = sorted({decodes_beside_prompts(count, size) for count in range(min(rows, size - 1) + 1)})
        for adapters in _adapter_counts(min(slots, size), size):
            for decodes in beside:
                count = min(decodes, rows, size - 1)
                # Large steps have many prompts; one that fills such a step needs the longest page tables.
                prompts = 1 if size <= SHORT_STEP else _FEW_PROMPTS
                if 0 < (size - count) // prompts < longest - 1:
                    yield WarmupStep(
                        count, 1, adapters, size - count, captured=True, is_new=decodes == beside[0], prompts=prompts
                    )
    for tokens in sorted({min(tokens, largest, longest - 1) for tokens in (*_LARGE_TOKENS, largest)}):
        for adapters in _adapter_counts(min(slots, tokens), tokens):
            for decodes in (0, 1):
                if tokens > decodes:
                    yield WarmupStep(decodes, 1, adapters, tokens - decodes, captured=False)
    for prompts in _PROMPTS:
        if prompts < rows and 2 * prompts < largest:
            yield WarmupStep(1, 1, 0, 2 * prompts, captured=False, prompts=prompts)


def _adapter_counts(most: int, rows: int) -> list[int]:
    """Return numbers of adapters with different tables, the base model alone included."""
    sizes = {padded_runs(count, rows) for count in range(1, most + 1)}
    return [0, *sorted(min(size, most) for size in sizes)]


def run_step(paged: PagedRunner, step: WarmupStep, longest: int) -> None:
    """Launch a step. The sequences' keys and values are in page 0, which no sequence has yet."""
    table, count = paged.table, step.decodes
    prompts = step.prompts if step.tokens else 0
    slots = np.arange(count + prompts) % step.adapters if step.adapters else np.full(count + prompts, -1)
    table.lengths[:count], table.slots[:count] = 1, slots[:count]
    if count:
        table.lengths[0] = min(step.pages * PAGE_TOKENS, longest)
    lengths = [len(part) for part in np.array_split(np.empty(step.tokens), prompts)] if prompts else []
    spans = [
        TokenSpan(np.zeros(length, dtype=np.int32), 0, paged.text, min(count + i, table.filler))
        for i, length in enumerate(lengths)
    ]
    items = StepItems(
        np.arange(count, dtype=np.int32), spans, [slot if slot >= 0 else None for slot in slots[count:].tolist()]
    )
    paged.launch_items(items, perf_counter()).wait()
    table.lengths[:count], table.slots[:count] = 0, -1


@torch.inference_mode()
def _sample(paged: PagedRunner) -> None:
    """Draw tokens with all features in the kernels, and with none in the rows."""
    head, last_token = paged.text, torch.zeros_like(paged.last_token)
    weight, device = head.lm_head.weight, last_token.device
    for features in _FEATURES:
        for rows in (1, 4):
            logits = head.lm_head.logits(torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=device))
            # In a step's buffer, columns are aligned to 4 bytes.
            columns = torch.zeros(rows * ROW_WIDTH + 1, dtype=torch.int32, device=device)[1:].view(rows, ROW_WIDTH)
            head.sampler.sample(logits, columns, features, last_token)
