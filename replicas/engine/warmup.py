"""Compiles and loads kernels before an engine takes requests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from ranklet.kernels.compile_ahead import compile_kernels, listed_kernels
from ranklet.kernels.precompile import precompile
from ranklet.replicas.engine.cuda_graphs import NEVER
from ranklet.replicas.engine.layout import whole_prompts
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.heads import Head

logger = logging.getLogger(__name__)

_TOKENS = (16, 300, 1100, 5000)
_ADAPTERS = (1, 2, 8, 64)
_LAYERS = 4  # metadata of slots has the same alignment in every fourth layer


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
    began_s = perf_counter()
    if runner.uses_cudnn:
        shape = model.architecture
        heads = (shape.heads, shape.kv_heads)
        cudnn_attention.build_graphs(model.device, max_sequences, longest, heads, shape.head_dim, model.dtype)
    built_s = perf_counter()
    with compiled_ahead(runner):
        for terms in (False, True):
            with pool.placeholder_adapters(terms=terms):
                _launch_all(runner, head, longest, max_sequences)
    compiled_s = perf_counter()
    pool.compile_load()
    with pool.placeholder_adapters():
        _launch_all(runner, head, longest, max_sequences)
    runner.free_caches()  # drops merged weights of the placeholder adapters
    logger.info(
        "warm-up took %.1f s: %.1f for cuDNN's graphs, %.1f to compile kernels, %.1f for steps",
        perf_counter() - began_s, built_s - began_s, compiled_s - built_s, perf_counter() - compiled_s,
    )  # fmt: skip


def _launch_all(runner: Runner, head: Head, longest: int, max_sequences: int) -> None:
    model, pool, max_tokens = runner.model, runner.pool, runner.max_tokens
    if runner.backend != "native":
        positions = torch.zeros(max_tokens, dtype=torch.int32, device=model.device)
        precompile(pool.stacks_of_one_layer(), max_tokens, model.rotary(model.layers[0], positions))
    full = [longest] * max(1, max_tokens // longest)
    with nullcontext() if runner.graphs is None else runner.graphs.capturing_after(NEVER):
        for lengths in ([1], full):
            _run(runner, head, lengths, [None] * len(lengths))
        for lengths, slots in _warmup_steps(pool.slots, longest, max_tokens, max_sequences):
            _run(runner, head, lengths, slots)


@contextmanager
def compiled_ahead(runner: Runner) -> Iterator[None]:
    """Compile the kernels that the context launches, all at once at its end, instead of launching them.

    The results of its steps have any contents. Only the first layers take part: those of some variants of alignment,
    and one for each window of attention.
    """
    model, began_s = runner.model, perf_counter()
    layers, windows = model.layers, [layer.window for layer in model.layers]
    model.layers = layers[: max(_LAYERS, *(windows.index(window) + 1 for window in windows))]
    try:
        with listed_kernels() as kernels:
            yield
    finally:
        model.layers = layers
    listed_s = perf_counter()
    failed = compile_kernels(list(kernels), model.device)
    logger.info(
        "listed %d kernels in %.1f s, compiled them in %.1f s; %d failed",
        len(kernels), listed_s - began_s, perf_counter() - listed_s, failed,
    )  # fmt: skip


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


def _run(runner: Runner, head: Head, lengths: list[int], slots: list[int | None]) -> None:
    prompts = [np.zeros(length, dtype=np.int32) for length in lengths]
    runner.launch(whole_prompts(prompts, head), slots).wait()
