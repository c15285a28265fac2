"""Measures the device memory that steps and CUDA graphs need beside weights and pages.

Graphs contain the addresses of the pages, and the pages take the memory that graphs leave. Therefore the memory is
measured with a single page, which all sequences write to and read from; graphs that serve the engine are captured
later.
"""

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch

from ranklet.kernels.logits import widened_bytes
from ranklet.kernels.sampling_row import TOP_LOGPROBS
from ranklet.replicas.cache.pages import pages_of
from ranklet.replicas.cache.tensors import KvPages
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.cuda_graphs import RUNS_TO_CAPTURE
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import StepItems
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.row_table import RowTable
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.engine.text_warmup import compile_text_kernels
from ranklet.replicas.engine.warmup import measured_workspace
from ranklet.replicas.model.heads import PoolingHeads, TextHead
from ranklet.replicas.model.sampling_values import SamplingValues

logger = logging.getLogger(__name__)

# Asks for all features of the sampler.
_EVERYTHING = SamplingValues(
    temperature=1.0, top_p=0.9, presence_penalty=1.0, logit_bias=((0, 1.0),), allowed_token_ids=(0,),
    logprobs=TOP_LOGPROBS,
)  # fmt: skip
_MEASURED_GRAPHS = 4
# A graph has some hundred launches, for which drivers keep up to 64 KiB each. More is memory that another process took
# while the graphs were captured.
_MOST_GRAPH_BYTES = 32 << 20


def text_reserve(
    runner: Runner, text: TextHead, pooling: PoolingHeads, config: EngineConfig, longest: int, workspace_bytes: int
) -> int:
    """Compile kernels, allocate the sampler's tables, and return the device memory that pages must leave free.

    This is the memory of the largest step, and of the copy of its logits that has adapters' added tokens, twice: for
    steps that Python launches, and for the pool that all graphs share. Then that of each graph outside the pool, for as
    many graphs as are kept, and that of merged weights. Loads of adapters, kernels that are loaded later and
    fragmentation are left to `kv_cache_fraction`.

    On the CPU and with `kv_cache_bytes` nothing is measured.

    Args:
        longest: tokens of the longest text.
        workspace_bytes: memory of the largest step without pages.
    """
    model, graphs = runner.model, runner.graphs
    if model.device.type != "cuda" or graphs is None:
        return 0
    text.sampler.prepare(_EVERYTHING.features)
    table = RowTable(config.max_batch_requests, pages_of(longest))
    page = KvPages(model.architecture, 1, model.device, model.dtype)
    paged = PagedRunner(runner, page, table, text, pooling)
    compile_text_kernels(paged, longest)
    if config.kv_cache_bytes is not None:
        return 0
    rows = min(table.filler, runner.max_tokens)
    adapters = min(runner.pool.slots, rows)
    table.slots[:rows] = np.arange(rows) % adapters
    table.sampling[:rows] = [_EVERYTHING.columns(row) for row in range(rows)]
    with runner.pool.placeholder_adapters():
        with measured_workspace(model.device) as largest:
            _run_largest_steps(paged, rows, longest)
        graph_bytes = _bytes_of_a_graph(paged, rows)
        runner.free_caches()
    more_ids = config.added_tokens if config.token_rows else 0  # the steps above have none
    copy_bytes = widened_bytes(rows, model.architecture.vocab, more_ids)
    step_bytes = max(largest.bytes + copy_bytes, workspace_bytes)
    logger.info("the largest step takes %d MB of device memory, a graph %.1f MB", step_bytes >> 20, graph_bytes / 2**20)
    return 2 * step_bytes + graphs.max_graphs * graph_bytes + config.merged_bytes


def _run_largest_steps(paged: PagedRunner, rows: int, longest: int) -> None:
    """Run the largest steps of decodes, of prompts, and of prompts beside a decode."""
    table, most = paged.table, paged.runner.max_tokens
    table.lengths[:rows] = 1
    table.lengths[0] = longest  # attention divides long sequences, and keeps a result for each part
    _run(paged, rows, [])
    _run(paged, 0, _prompts(paged, range(rows), min(most // rows, longest)))
    if rows > 1:
        _run(paged, 1, _prompts(paged, range(1, rows), min((most - 1) // (rows - 1), longest)))


def _bytes_of_a_graph(paged: PagedRunner, rows: int) -> int:
    """Return the device memory that a graph takes outside the shared pool: its input, its outputs and the driver's."""
    device = paged.runner.model.device

    def capture(size: int) -> None:
        for _ in range(RUNS_TO_CAPTURE):
            _run(paged, size, [])

    def taken() -> int:
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device) + torch.cuda.memory_allocated(device)

    first, *others = sorted({max(rows >> power, 1) for power in range(1 + _MEASURED_GRAPHS)}, reverse=True)
    capture(first)  # pays for what all graphs share
    before = taken()
    for size in others:
        capture(size)
    each = (taken() - before) // max(len(others), 1)
    return min(max(each, 0), _MOST_GRAPH_BYTES)


def _prompts(paged: PagedRunner, rows: Sequence[int], length: int) -> list[TokenSpan]:
    return [TokenSpan(np.zeros(length, dtype=np.int32), 0, paged.text, row) for row in rows]


def _run(paged: PagedRunner, decodes: int, spans: list[TokenSpan]) -> None:
    slots = [int(paged.table.slots[span.row]) for span in spans]
    items = StepItems(np.arange(decodes, dtype=np.int32), spans, slots)
    paged.launch_items(items, perf_counter()).wait()
