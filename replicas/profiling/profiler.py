"""Where a batch's time goes: each stage's time on the device beside the least that it could take."""

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
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model.decoder import ignore_stage
from ranklet.replicas.profiling.clock import Clock, seconds
from ranklet.replicas.profiling.roofline import AdapterShare, BatchShape, Ceilings, Cost, costs, lora_costs

_WARM = 3
# Rows, depth, columns. The best of them is the ceiling: on an H200 a decoder's wide first product outruns a square one.
_PRODUCTS = {"cuda": ((8192, 8192, 8192), (32_768, 1024, 4096)), "cpu": ((768, 768, 768),)}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_IDLE = 0.8  # of a batch's time on the device: if Python takes longer to launch it, the device waits for Python


@dataclass(frozen=True)
class Stage:
    """One stage, all layers together. Times in milliseconds."""

    name: str
    calls: int
    ms: float  # without LoRA
    floor_ms: float
    bound: str  # by compute or memory
    lora_ms: float  # what LoRA adds
    lora_floor_ms: float  # what it must add to the floor

    @property
    def gap_ms(self) -> float:
        return self.ms + self.lora_ms - self.floor_ms - self.lora_floor_ms


@dataclass(frozen=True)
class Profile:
    """One batch shape. Times in milliseconds."""

    tokens: int
    prompts: int
    adapters: int
    backend: str
    stages: tuple[Stage, ...]
    base_ms: float  # the whole batch without LoRA, ignore_stage
    lora_ms: float  # the whole batch as asked, as it is served: a small one is replayed from a CUDA graph
    eager_ms: float  # the same launched kernel by kernel, as the stages are
    launch_ms: float  # of Python, for that
    ceilings: Ceilings
    device: str

    @property
    def floor_ms(self) -> float:
        return sum(stage.floor_ms + stage.lora_floor_ms for stage in self.stages)

    @property
    def launch_bound(self) -> bool:
        """Whether the device waits for Python between kernels, and so the stages' times hold waiting too."""
        return self.device != "cpu" and self.launch_ms > _IDLE * self.eager_ms


@dataclass
class _Runs:
    """One batch, run again and again. Times in milliseconds."""

    stepper: Runner
    device: torch.device
    prompts: Sequence[NDArray[np.int32]]
    slots: Sequence[int | None]
    backend: str = "none"
    served: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    launching: list[float] = field(default_factory=list)
    _stages: list[dict[str, list[float]]] = field(default_factory=list)

    def warm(self) -> None:
        running = self.stepper.launch(self.prompts, self.slots)
        running.wait()
        self.backend = running.backend

    def time(self) -> None:
        """Once as it is served, once kernel by kernel, once with marks."""
        clock = Clock(self.device)
        served = self.stepper.launch(self.prompts, self.slots)
        served.wait()
        eager = self.stepper.launch(self.prompts, self.slots, ignore_stage)  # any mark keeps CUDA graphs out of it
        eager.wait()
        self.stepper.launch(self.prompts, self.slots, clock.mark).wait()
        self.served.append(served.device_s() * 1e3)
        self.eager.append(eager.device_s() * 1e3)
        self.launching.append(eager.took_s * 1e3)
        self._stages.append(clock.read())

    def calls(self) -> dict[str, int]:
        """How often each stage ran."""
        return {name: len(times) for name, times in self._stages[0].items()}

    def stages(self) -> dict[str, float]:
        """Each stage's time: the median of each call, all calls added up."""
        return {
            name: sum(map(median, zip(*(one[name] for one in self._stages), strict=True))) for name in self._stages[0]
        }


def profile(config: EngineConfig, adapters: Sequence[AdapterRef], lengths: Sequence[int], repeats: int = 5) -> Profile:
    """Time one batch of prompts of these lengths, which take the adapters in turn.

    Raises:
        ModelError: the model folder cannot be served.
        InvalidAdapter, AdapterNotFound: an adapter cannot.
        ValueError: the batch is larger than the settings or the model allow.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("expected at least one prompt, of at least one token")
    _fits("prompts (max_batch_requests)", len(lengths), config.max_batch_requests)
    _fits("tokens (max_batch_tokens)", sum(lengths), config.max_batch_tokens)
    _fits("adapters (slots)", len(set(adapters)), config.slots)
    engine = Engine(config)
    try:
        _fits("tokens a prompt (the model's own limit, or max_model_len)", max(lengths), engine.limits.max_model_len)
        engine.start()
        for adapter in adapters:
            engine.load(adapter)
    finally:
        engine.stop()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for length in lengths]
    taken = [engine.slot_of(adapter) for adapter in adapters] or [None]
    slots = [taken[i % len(taken)] for i in range(len(lengths))]
    base = _Runs(engine.stepper, engine.device, prompts, [None] * len(prompts))
    lora = _Runs(engine.stepper, engine.device, prompts, slots) if adapters else base
    _run([base, lora] if adapters else [base], repeats)
    size = torch.empty((), dtype=engine.dtype).element_size()
    adapted = _adapted(engine, lengths, slots)
    batch = BatchShape(lengths, engine.pools_last, size, adapted, merged=lora.backend == "merged")
    ceilings = measure(engine.device, engine.dtype)
    return Profile(
        sum(lengths), len(lengths), len(adapted), lora.backend, _stages(engine, batch, base, lora, ceilings),
        median(base.served), median(lora.served), median(lora.eager), median(lora.launching), ceilings,
        torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
    )  # fmt: skip


def _fits(what: str, got: int, most: int) -> None:
    if got > most:
        raise ValueError(f"expected at most {most} {what}, got {got}")


def _adapted(engine: Engine, lengths: Sequence[int], slots: Sequence[int | None]) -> list[AdapterShare]:
    found = []
    for slot in dict.fromkeys(slots):
        if slot is not None:
            own = [length for length, taken in zip(lengths, slots, strict=True) if taken == slot]
            found.append(AdapterShare(sum(own), len(own), engine.ranks_in(slot)))
    return found


def _run(batches: Sequence[_Runs], repeats: int) -> None:
    """In turns, so that a machine that slows down does so for each."""
    for _ in range(_WARM):
        for batch in batches:
            batch.warm()
    for _ in range(repeats):
        for batch in batches:
            batch.time()


def _stages(engine: Engine, batch: BatchShape, base: _Runs, lora: _Runs, ceilings: Ceilings) -> tuple[Stage, ...]:
    """Every stage that the model marked; one without a floor would be a KeyError."""
    floors, more = costs(engine.architecture, batch), lora_costs(engine.architecture, batch)
    calls, with_lora, stages = base.calls(), lora.stages(), []
    for name, ms in base.stages().items():
        together = floors[name] + more.get(name, Cost())
        floor_s = floors[name].floor_s(ceilings)
        added_s = together.floor_s(ceilings) - floor_s
        bound = together.bound(ceilings)
        stages.append(Stage(name, calls[name], ms, floor_s * 1e3, bound, with_lora[name] - ms, added_s * 1e3))
    return tuple(stages)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What this device does with the better of some large matrix products, and with a large copy."""
    rates = []
    for rows, deep, columns in _PRODUCTS[device.type]:
        a, b = torch.randn(rows, deep, device=device).to(dtype), torch.randn(columns, deep, device=device).to(dtype)
        rates.append(2.0 * rows * deep * columns / seconds(partial(functional.linear, a, b), device))
    source = torch.empty(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return Ceilings(max(rates), 2.0 * source.numel() / seconds(lambda: target.copy_(source), device))
