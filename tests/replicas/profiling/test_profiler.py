"""One profile of the demo's model on the CPU: slow, but true."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.profiling.clock import Clock
from ranklet.replicas.profiling.profiler import Profile, measure, profile
from ranklet.replicas.profiling.roofline import STAGES, Ceilings
from tests.assets.make import AdapterSpec
from tests.replicas.asking import ref

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(model_dir: Path, adapter_specs: list[AdapterSpec]) -> Profile:
    """Three prompts, of an adapter on attention, of one on the embedding too, and of the first again."""
    adapters = [ref(spec.path) for spec in adapter_specs if spec.name in ("legal-v2", "catalog-embed")]
    config = EngineConfig(model_dir, slots=2, base_aliases=("*",))
    return profile(config, adapters, [50, 20, 30], repeats=3)


def test_it_has_every_stage_that_the_model_marks(found: Profile) -> None:
    assert {stage.name: stage.calls for stage in found.stages} == {
        "embed": 1, "norm": 8, "qkv": 4, "attention": 4, "o": 4, "gate_up": 4, "down": 4, "pool": 1
    }  # fmt: skip
    assert tuple(stage.name for stage in found.stages) == STAGES
    assert all(stage.ms > 0 and stage.floor_ms > 0 for stage in found.stages)


def test_its_stages_add_up(found: Profile) -> None:
    assert 0 < sum(stage.ms for stage in found.stages) < 10 * found.base_ms, "no tighter, for this machine is shared"
    gaps = sum(stage.gap_ms for stage in found.stages)
    assert gaps == pytest.approx(sum(stage.ms + stage.lora_ms for stage in found.stages) - found.floor_ms)


def test_lora_has_a_floor_where_the_adapters_are(found: Profile) -> None:
    assert (found.tokens, found.prompts, found.adapters, found.backend) == (100, 3, 2, "native")
    assert {stage.name for stage in found.stages if stage.lora_floor_ms > 0} >= {"embed", "qkv", "o"}
    assert all(stage.lora_floor_ms == 0 for stage in found.stages if stage.name in ("gate_up", "down", "norm", "pool"))


def test_a_device_that_waits_for_python_is_said_to(found: Profile) -> None:
    assert not found.launch_bound, "on the CPU a launch is the whole computation"
    gpu = replace(found, device="some GPU", eager_ms=10.0)
    assert [replace(gpu, launch_ms=ms).launch_bound for ms in (2.0, 9.0)] == [False, True]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([65], "at most 64 tokens"),
        ([1] * 9, "at most 8 prompts"),
        ([31], "at most 30 tokens a prompt"),
        ([], "at least one prompt"),
        ([3, 0], "at least one token"),
    ],
)
def test_a_batch_that_nobody_could_serve_is_refused(lengths: list[int], said: str, model_dir: Path) -> None:
    config = EngineConfig(model_dir, max_batch_tokens=64, max_batch_requests=8, max_model_len=30)
    with pytest.raises(ValueError, match=said):
        profile(config, [], lengths)


def test_more_adapters_than_slots_are_refused(model_dir: Path, adapter_specs: list[AdapterSpec]) -> None:
    with pytest.raises(ValueError, match="at most 1 adapters"):
        profile(EngineConfig(model_dir, slots=1), [ref(spec.path) for spec in adapter_specs[:2]], [5])


def test_ceilings_are_positive() -> None:
    found = measure(CPU, torch.float32)
    assert isinstance(found, Ceilings)
    assert min(found.operations_per_s, found.bytes_per_s) > 1e6


def test_a_clock_keeps_stages_apart() -> None:
    clock = Clock(CPU)
    for stage in ("begin", "one", "two", "one"):
        clock.mark(stage)
    assert {stage: len(times) for stage, times in clock.read().items()} == {"one": 2, "two": 1}
