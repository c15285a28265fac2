"""Profiles of the demo model on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.profiling.clock import StageClock
from ranklet.replicas.profiling.profiler import Profile, Stage, measure_ceilings, profile
from ranklet.replicas.profiling.roofline import STAGES, BatchShape, Ceilings, base_costs
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import ref

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(model_dir: Path, adapter_specs: list[AdapterSpec]) -> Profile:
    """Three prompts and two adapters: one on attention, one on attention and the embedding, and the first again."""
    adapters = [ref(spec.path) for spec in adapter_specs if spec.name in ("legal-v2", "catalog-embed")]
    config = EngineConfig(model_dir, slots=2, base_aliases=("*",))
    return profile(config, adapters, [50, 20, 30], repeats=3)


def test_every_stage_of_the_model_is_timed(found: Profile) -> None:
    assert {stage.name: stage.calls for stage in found.stages} == {
        "embed": 1, "norm": 8, "qkv": 4, "attention": 4, "o": 4, "gate_up": 4, "down": 4, "pool": 1
    }  # fmt: skip
    assert tuple(stage.name for stage in found.stages) == STAGES
    assert all(stage.ms > 0 and stage.floor_ms > 0 for stage in found.stages)


def test_stages_take_about_as_long_as_the_batch(found: Profile) -> None:
    """The factor is wide because other processes share the machine."""
    assert found.base_ms / 10 < sum(stage.ms for stage in found.stages) < found.base_ms * 10


def test_floors_are_those_of_the_batch_and_the_ceilings(found: Profile, architecture: Architecture) -> None:
    floors = base_costs(architecture, BatchShape([50, 20, 30], last_only=True, element_bytes=4))
    for stage in found.stages:
        assert stage.floor_ms == pytest.approx(floors[stage.name].floor_s(found.ceilings) * 1e3), stage.name
    with_lora = sum(stage.lora_floor_ms for stage in found.stages)
    assert found.floor_ms == pytest.approx(
        sum(floors[name].floor_s(found.ceilings) for name in STAGES) * 1e3 + with_lora
    )


def test_a_gap_is_the_time_above_the_floor() -> None:
    stage = Stage("qkv", 28, ms=10.0, floor_ms=7.0, bound="compute", lora_ms=2.0, lora_floor_ms=0.5)
    assert stage.gap_ms == 4.5


def test_lora_adds_to_the_floor_of_adapted_stages(found: Profile) -> None:
    assert (found.tokens, found.prompts, found.adapters, found.backend) == (100, 3, 2, "native")
    assert {stage.name for stage in found.stages if stage.lora_floor_ms > 0} >= {"embed", "qkv", "o"}
    assert all(stage.lora_floor_ms == 0 for stage in found.stages if stage.name in ("gate_up", "down", "norm", "pool"))


def test_a_slow_launch_makes_a_gpu_launch_bound(found: Profile) -> None:
    assert not found.launch_bound, "on the CPU, launching is the computation"
    gpu = replace(found, device="some GPU", eager_ms=10.0)
    assert [replace(gpu, launch_ms=ms).launch_bound for ms in (2.0, 9.0)] == [False, True]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([65], "at most 64 tokens"),
        ([1] * 9, "at most 8 prompts"),
        ([31], "at most 30 tokens a prompt"),
        ([], "at least one prompt"),
        ([3, 0], "at least one token"),
    ],
)
def test_a_batch_over_a_limit_is_refused(lengths: list[int], message: str, model_dir: Path) -> None:
    config = EngineConfig(model_dir, max_batch_tokens=64, max_batch_requests=8, max_model_len=30)
    with pytest.raises(ValueError, match=message):
        profile(config, [], lengths)


def test_more_adapters_than_slots_are_refused(model_dir: Path, adapter_specs: list[AdapterSpec]) -> None:
    with pytest.raises(ValueError, match="at most 1 adapters"):
        profile(EngineConfig(model_dir, slots=1), [ref(spec.path) for spec in adapter_specs[:2]], [5])


def test_ceilings_are_positive() -> None:
    found = measure_ceilings(CPU, torch.float32)
    assert isinstance(found, Ceilings)
    assert min(found.operations_per_s, found.bytes_per_s) > 1e6


def test_a_clock_collects_the_calls_of_each_stage() -> None:
    clock = StageClock(CPU)
    for stage in ("start", "one", "two", "one"):
        clock.record(stage)
    assert {stage: len(times) for stage, times in clock.times_ms().items()} == {"one": 2, "two": 1}
