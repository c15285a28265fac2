"""Where a batch's time goes: each stage's time on the device beside the least that it could take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine import Engine
from ranklet.replicas.reference import AdapterRef
from ranklet.replicas.stages import STAGES, Ceilings, Cost, Shape, costs, lora_costs

_WARM = 3
_SQUARE = {"cuda": 8192, "cpu": 768}  # of the product that shows the ceiling
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Stage:
    """One stage, all layers together. Times in milliseconds."""

    name: str
    calls: int
    ms: float  # without LoRA
    floor_ms: float
    bound: str  # by compute or memory
    lora_ms: float  # what LoRA adds
    lora_floor_ms: float


@dataclass(frozen=True)
class Profile:
    """One batch shape. Times in milliseconds."""

    tokens: int
    prompts: int
    adapters: int
    backend: str
    stages: tuple[Stage, ...]
    base_ms: float  # the whole batch without LoRA, unmarked
    lora_ms: float  # the whole batch as asked
    launch_ms: float  # of Python, for the batch as asked, launched kernel by kernel
    ceilings: Ceilings
    device: str

    @property
    def floor_ms(self) -> float:
        return sum(stage.floor_ms + stage.lora_floor_ms for stage in self.stages)


@dataclass
class _Clock:
    """Times between marks, by stage: of the device where there is one, else of the CPU."""

    cuda: bool
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, stage: str) -> None:
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        self._marks.append((stage, now))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each call of each stage."""
        found: dict[str, list[float]] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            ms = before.elapsed_time(after) if self.cuda else (after - before) * 1e3
            found.setdefault(stage, []).append(ms)
        return found


@dataclass(frozen=True)
class _Timing:
    ms: dict[str, float]  # by stage
    calls: dict[str, int]
    whole_ms: float
    launch_ms: float
    backend: str


def profile(config: EngineConfig, adapters: Sequence[AdapterRef], lengths: Sequence[int], repeats: int = 5) -> Profile:
    """Time one batch of prompts of these lengths, which take the adapters in turn.

    Raises:
        ModelError: the model folder cannot be served.
        InvalidAdapter, AdapterNotFound: an adapter cannot.
        ValueError: the batch is larger than the settings allow.
    """
    if sum(lengths) > config.max_batch_tokens:
        raise ValueError(f"expected at most {config.max_batch_tokens} tokens (max_batch_tokens), got {sum(lengths)}")
    engine = Engine(config)
    engine.start()
    try:
        infos = [engine.load(adapter) for adapter in adapters]
    finally:
        engine.stop()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for length in lengths]
    taken = [engine.slot_of(adapter) for adapter in adapters] or [None]
    slots = [taken[i % len(taken)] for i in range(len(lengths))]
    base = _timed(engine, prompts, [None] * len(prompts), repeats)
    lora = _timed(engine, prompts, slots, repeats) if adapters else base
    batch = Shape(
        lengths, engine.pools_last, torch.empty((), dtype=engine.dtype).element_size(), len(set(slots) - {None}),
        sum(lengths) if adapters else 0, {module: info.rank for info in infos for module in info.modules},
    )  # fmt: skip
    ceilings = measure(engine.device, engine.dtype)
    floors, more = costs(engine.architecture, batch), lora_costs(engine.architecture, batch)
    stages = tuple(
        Stage(
            name, base.calls[name], base.ms[name], floors[name].floor_s(ceilings) * 1e3, floors[name].bound(ceilings),
            lora.ms[name] - base.ms[name], more.get(name, Cost()).floor_s(ceilings) * 1e3,
        )
        for name in STAGES
    )  # fmt: skip
    return Profile(
        sum(lengths), len(lengths), batch.adapters, lora.backend, stages, base.whole_ms, lora.whole_ms, lora.launch_ms,
        ceilings, torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
    )  # fmt: skip


def _timed(engine: Engine, prompts: Sequence[NDArray[np.int32]], slots: Sequence[int | None], repeats: int) -> _Timing:
    stepper = engine.stepper
    for _ in range(_WARM):
        backend = stepper.launch(prompts, slots).backend
    wholes, launches, seen = [], [], []
    for _ in range(repeats):
        running = stepper.launch(prompts, slots)
        running.wait()
        wholes.append(running.device_s() * 1e3)
        clock = _Clock(engine.device.type == "cuda")
        marked = stepper.launch(prompts, slots, clock.mark)
        marked.wait()
        launches.append(marked.took_s * 1e3)
        seen.append(clock.read())
    ms = {name: sum(map(median, zip(*(one[name] for one in seen), strict=True))) for name in seen[0]}
    calls = {name: len(times) for name, times in seen[0].items()}
    return _Timing(ms, calls, median(wholes), median(launches), backend)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What this device does with a large matrix product, and with a large copy."""
    side = _SQUARE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    product_s = _seconds(lambda: torch.mm(a, b), device)
    copy_s = _seconds(lambda: target.copy_(source), device)
    return Ceilings(2.0 * side**3 / product_s, 2.0 * source.numel() / copy_s)


def _seconds(call: Any, device: torch.device, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        clock = _Clock(device.type == "cuda")
        clock.mark("begin")
        call()
        clock.mark("call")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock.read()["call"][0] * 1e-3)
    return median(times[2:])
