"""Profiles a batch: compares the time of each stage with the least time that the device's ceilings allow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.layout import whole_prompts
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model.decoder import StageCallback, ignore_stage
from ranklet.replicas.model.heads import Head
from ranklet.replicas.profiling.clock import StageClock, median_s
from ranklet.replicas.profiling.roofline import (
    AdapterShare,
    BatchShape,
    Ceilings,
    Cost,
    base_costs,
    lora_costs,
)  # fmt: skip

_WARMUPS = 3
# Rows, depth and columns of the products whose best rate is the compute ceiling. On an H200 the wide product of a
# decoder's qkv projection is faster than a square one.
_PRODUCTS = {"cuda": ((8192, 8192, 8192), (32_768, 1024, 4096)), "cpu": ((768, 768, 768),)}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_LAUNCH_BOUND = 0.8  # launch time, as a share of device time, above which the device waits for Python


@dataclass(frozen=True)
class Stage:
    """The calls of one stage in all layers. Times in milliseconds."""

    name: str
    calls: int
    ms: float  # without LoRA
    floor_ms: float
    bound: str  # "compute" or "memory"
    lora_ms: float  # added by LoRA
    lora_floor_ms: float  # added to the floor by LoRA

    @property
    def gap_ms(self) -> float:
        return self.ms + self.lora_ms - self.floor_ms - self.lora_floor_ms


@dataclass(frozen=True)
class Profile:
    """The times of one batch. Times in milliseconds."""

    tokens: int
    prompts: int
    adapters: int
    backend: str
    stages: tuple[Stage, ...]
    base_ms: float  # the whole batch without LoRA
    lora_ms: float  # the whole batch as it is served: a small one is replayed from a CUDA graph
    eager_ms: float  # the whole batch launched kernel by kernel, as the stages are
    launch_ms: float  # Python's time to launch the batch kernel by kernel
    ceilings: Ceilings
    device: str

    @property
    def floor_ms(self) -> float:
        return sum(stage.floor_ms + stage.lora_floor_ms for stage in self.stages)

    @property
    def launch_bound(self) -> bool:
        """Whether the device waits for Python between kernels, so that the stages' times include waiting."""
        return self.device != "cpu" and self.launch_ms > _LAUNCH_BOUND * self.eager_ms


@dataclass
class _BatchTimer:
    """Runs one batch repeatedly and keeps the times, in milliseconds."""

    runner: Runner
    head: Head
    device: torch.device
    prompts: Sequence[NDArray[np.int32]]
    slots: Sequence[int | None]
    backend: str = "none"
    served: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    launching: list[float] = field(default_factory=list)
    stages: list[dict[str, list[float]]] = field(default_factory=list)

    def _launch(self, on_stage: StageCallback | None = None) -> LaunchedStep:
        return self.runner.launch(whole_prompts(self.prompts, self.head), self.slots, on_stage)

    def warm_up(self) -> None:
        step = self._launch()
        step.wait()
        self.backend = step.backend

    def time(self) -> None:
        """Run the batch three times: as in service, launched kernel by kernel, and with each stage timed."""
        clock = StageClock(self.device)
        served = self._launch()
        served.wait()
        eager = self._launch(ignore_stage)  # a callback rules out CUDA graphs
        eager.wait()
        self._launch(clock.record).wait()
        self.served.append(served.device_s() * 1e3)
        self.eager.append(eager.device_s() * 1e3)
        self.launching.append(eager.launch_s * 1e3)
        self.stages.append(clock.times_ms())

    def stage_ms(self) -> dict[str, float]:
        """Return the time of each stage: the sum over its calls of the median of all runs."""
        runs_of_calls = {name: zip(*(run[name] for run in self.stages), strict=True) for name in self.stages[0]}
        return {name: sum(map(median, runs)) for name, runs in runs_of_calls.items()}


def profile(config: EngineConfig, adapters: Sequence[AdapterRef], lengths: Sequence[int], repeats: int = 5) -> Profile:
    """Time one batch of prompts of these lengths; prompt i uses adapter i modulo their number.

    Raises:
        ModelError: the model folder cannot be served.
        InvalidAdapter, AdapterNotFound: an adapter cannot be served.
        ValueError: the batch exceeds a limit of the settings or the model.
    """
    _check_batch(config, adapters, lengths)
    engine = _loaded_engine(config, adapters, max(lengths))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for length in lengths]
    used = [engine.slot_of(adapter) for adapter in adapters] or [None]
    slots = [used[i % len(used)] for i in range(len(lengths))]
    base = _BatchTimer(engine.runner, engine.heads.base, engine.device, prompts, [None] * len(prompts))
    lora = _BatchTimer(engine.runner, engine.heads.base, engine.device, prompts, slots) if adapters else base
    _time([base, lora] if adapters else [base], repeats)
    size = torch.empty((), dtype=engine.dtype).element_size()
    shares = _shares(engine, lengths, slots)
    batch = BatchShape(lengths, engine.heads.base.reads_last, size, shares, merged=lora.backend == "merged")
    ceilings = measure_ceilings(engine.device, engine.dtype)
    return Profile(
        sum(lengths), len(lengths), len(shares), lora.backend, _stages(engine, batch, base, lora, ceilings),
        median(base.served), median(lora.served), median(lora.eager), median(lora.launching), ceilings,
        torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
    )  # fmt: skip


def _check_batch(config: EngineConfig, adapters: Sequence[AdapterRef], lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError("expected at least one prompt, of at least one token")
    _check_limit("prompts (max_batch_requests)", len(lengths), config.max_batch_requests)
    _check_limit("tokens (max_batch_tokens)", sum(lengths), config.max_batch_tokens)
    _check_limit("adapters (slots)", len(set(adapters)), config.slots)


def _check_limit(noun: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"expected at most {limit} {noun}, got {count}")


def _loaded_engine(config: EngineConfig, adapters: Sequence[AdapterRef], longest: int) -> Engine:
    """Return an engine with the adapters in its slots. Its threads have ended, so that only the profiler uses it."""
    engine = Engine(config)
    try:
        _check_limit("tokens a prompt (max_model_len, or the model's own limit)", longest, engine.limits.max_model_len)
        engine.start()
        for adapter in adapters:
            engine.load(adapter)
    finally:
        engine.stop()
    return engine


def _shares(engine: Engine, lengths: Sequence[int], slots: Sequence[int | None]) -> list[AdapterShare]:
    shares = []
    for slot in dict.fromkeys(slots):
        if slot is not None:
            own = [length for length, used in zip(lengths, slots, strict=True) if used == slot]
            shares.append(AdapterShare(sum(own), len(own), engine.runner.pool.ranks(slot)))
    return shares


def _time(batches: Sequence[_BatchTimer], repeats: int) -> None:
    for _ in range(_WARMUPS):
        for batch in batches:
            batch.warm_up()
    for _ in range(repeats):  # alternating, so that a machine that slows down affects every batch
        for batch in batches:
            batch.time()


def _stages(
    engine: Engine, batch: BatchShape, base: _BatchTimer, lora: _BatchTimer, ceilings: Ceilings
) -> tuple[Stage, ...]:
    base_floors, lora_floors = base_costs(engine.architecture, batch), lora_costs(engine.architecture, batch)
    with_lora, stages = lora.stage_ms(), []
    for name, ms in base.stage_ms().items():
        together = base_floors[name] + lora_floors.get(name, Cost())
        floor_s = base_floors[name].floor_s(ceilings)
        added_s = together.floor_s(ceilings) - floor_s
        calls, bound = len(base.stages[0][name]), together.bound(ceilings)
        stages.append(Stage(name, calls, ms, floor_s * 1e3, bound, with_lora[name] - ms, added_s * 1e3))
    return tuple(stages)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the best rate of large matrix products, and the rate of a large copy."""
    rates = []
    for rows, depth, columns in _PRODUCTS[device.type]:
        a, b = torch.randn(rows, depth, device=device).to(dtype), torch.randn(columns, depth, device=device).to(dtype)
        rates.append(2.0 * rows * depth * columns / median_s(partial(functional.linear, a, b), device))
    source = torch.empty(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return Ceilings(max(rates), 2.0 * source.numel() / median_s(lambda: target.copy_(source), device))
