"""Compiles and loads kernels before an engine takes requests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from ranklet.kernels.precompile import precompile
from ranklet.replicas.engine.cuda_graphs import RUNS_TO_CAPTURE
from ranklet.replicas.engine.layout import TokenSpan, whole_prompts
from ranklet.replicas.engine.paged_layout import StepItems
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.heads import Head

logger = logging.getLogger(__name__)

_TOKENS = (16, 300, 1100, 5000)
_ADAPTERS = (1, 2, 8, 64)
_PIECE_TOKENS = 1024


def _warmup_steps(
    slots: int, longest: int, max_tokens: int, max_sequences: int
) -> Iterator[tuple[list[int], list[int | None]]]:
    """Yield steps, as prompt lengths and slots, that together launch every kernel in every specialization.

    Triton compiles a kernel again for an argument that is 1 or a multiple of 16. The steps therefore differ in size, in
    the number of adapters, and in whether they have rows of the base model.
    """
    for tokens in sorted({min(tokens, max_tokens) for tokens in (*_TOKENS, max_tokens)}):
        for adapters in sorted({min(count, slots, tokens) for count in _ADAPTERS}):
            for base in (0, 1):
                count = min(max(adapters + base, tokens // min(longest, 512)), max_sequences, tokens)
                taken: list[int | None] = [i % adapters if i >= base else None for i in range(count)]
                yield [max(1, min(tokens // count, longest))] * count, taken


def warm_up(runner: Runner, head: Head, longest: int, max_sequences: int) -> None:
    """Compile and load the kernels of steps of up to `max_sequences` prompts of up to `longest` tokens.

    Does nothing on the CPU, nor in float32, which serves only comparisons: Triton takes seconds for each of some
    hundred kernels.
    """
    model, pool = runner.model, runner.pool
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return
    began_s, max_tokens = perf_counter(), runner.max_tokens
    if runner.backend != "native":
        positions = torch.zeros(max_tokens, dtype=torch.int32, device=model.device)
        precompile(pool.stacks_of_one_layer(), max_tokens, model.rotary(model.layers[0], positions))
    if runner.uses_cudnn:
        shape = model.architecture
        heads = (shape.heads, shape.kv_heads)
        cudnn_attention.build_graphs(model.device, max_sequences, longest, heads, shape.head_dim, model.dtype)
    full = [longest] * max(1, max_tokens // longest)
    for lengths in ([1], full):
        _run(runner, head, lengths, [None] * len(lengths))
    pool.compile_load()
    with pool.placeholder_adapters():
        for lengths, slots in _warmup_steps(pool.slots, longest, max_tokens, max_sequences):
            _run(runner, head, lengths, slots)
        runner.free_caches()  # drops graphs and merged weights of the placeholder adapters
    logger.info("warm-up took %.1f s", perf_counter() - began_s)


@dataclass
class StepWorkspace:
    bytes: int = 0


@contextmanager
def measured_workspace(device: torch.device) -> Iterator[StepWorkspace]:
    """Measure the device memory that steps allocate and free again; 0 on the CPU."""
    found = StepWorkspace()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


def warm_up_text(paged: PagedRunner, longest: int) -> None:
    """Compile kernels and capture the CUDA graphs of decodes, with and without adapters. Does nothing on the CPU."""
    runner, table = paged.runner, paged.table
    if runner.model.device.type != "cuda":
        return
    began_s = perf_counter()
    most = min(table.filler, runner.max_tokens)
    sizes = sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})
    pool = runner.pool
    adapters = sorted({min(count, pool.slots) for count in (0, *_ADAPTERS)})
    table.lengths[:most] = 1
    with pool.placeholder_adapters(in_layers=True):
        for count in adapters:
            table.slots[:most] = [i % count for i in range(most)] if count else -1
            for rows in sizes:
                if rows >= count:
                    for _ in range(RUNS_TO_CAPTURE if runner.model.dtype != torch.float32 else 1):
                        _run_paged(paged, rows, [], None)
            # A piece of a prompt beside decodes, and a prompt alone.
            piece, slot = min(_PIECE_TOKENS, runner.max_tokens - 1, longest - 1), 0 if count else None
            for length in {min(64, piece), piece}:
                _run_paged(paged, 1, [TokenSpan(np.zeros(length, dtype=np.int32), 1, paged.text, 0)], slot)
                _run_paged(paged, 0, [TokenSpan(np.zeros(length, dtype=np.int32), 0, paged.text, 0)], slot)
    table.lengths[:most], table.slots[:most] = 0, -1
    logger.info("warm-up for text took %.1f s", perf_counter() - began_s)


def _run_paged(paged: PagedRunner, decodes: int, spans: list[TokenSpan], slot: int | None) -> None:
    items = StepItems(np.arange(decodes, dtype=np.int32), spans, [slot] * len(spans))
    paged.launch_items(items, perf_counter()).wait()


def _run(runner: Runner, head: Head, lengths: list[int], slots: list[int | None]) -> None:
    prompts = [np.zeros(length, dtype=np.int32) for length in lengths]
    runner.launch(whole_prompts(prompts, head), slots).wait()
