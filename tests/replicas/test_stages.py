"""Floors against numbers worked out by hand for Qwen3-Embedding-0.6B and 5 x 6144 tokens."""

from pathlib import Path

import pytest

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.profile import profile
from ranklet.replicas.stages import STAGES, Ceilings, Cost, Shape, costs, lora_costs
from tests.assets.make import AdapterSpec
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B
from tests.replicas.asking import ref

T = 5 * 6144
LONG = Shape([6144] * 5, last_only=False, element_bytes=2)


def test_products_count_their_operations_and_bytes() -> None:
    found = costs(QWEN3_EMBEDDING_06B, LONG)
    assert found["qkv"].operations == 28 * 2 * T * 1024 * 4096
    assert found["qkv"].bytes == 28 * 2 * (T * 1024 + T * 4096 + 1024 * 4096)
    assert found["gate_up"].operations == 28 * 2 * T * 1024 * 6144
    assert found["gate_up"].bytes == 28 * 2 * (T * 1024 + T * 3072 + 1024 * 6144), "the activation is all it writes"
    assert found["attention"].operations == pytest.approx(28 * 5 * 2 * 6144**2 * 16 * 128, rel=1e-3)


def test_the_last_layer_does_less_where_last_tokens_are_all_that_is_read() -> None:
    whole = costs(QWEN3_EMBEDDING_06B, LONG)
    less = costs(QWEN3_EMBEDDING_06B, Shape([6144] * 5, last_only=True, element_bytes=2))
    assert less["qkv"] == whole["qkv"]
    for stage in ("o", "gate_up", "down"):
        assert less[stage].operations / whole[stage].operations == pytest.approx(27 / 28, rel=1e-3)
    assert less["attention"].operations / whole["attention"].operations == pytest.approx(27 / 28, rel=1e-3)


def test_lora_adds_its_two_products() -> None:
    ranks = dict.fromkeys(ATTENTION, 64)
    batch = Shape([6144] * 5, last_only=False, element_bytes=2, adapters=4, adapted_tokens=T, ranks=ranks)
    found = lora_costs(QWEN3_EMBEDDING_06B, batch)
    assert set(found) == {"qkv", "o"}
    assert found["qkv"].operations == 28 * 2 * T * 64 * (3 * 1024 + 4096)
    assert found["o"].operations == 28 * 2 * T * 64 * (2048 + 1024)
    assert lora_costs(QWEN3_EMBEDDING_06B, LONG) == {}


def test_a_floor_is_the_lower_ceiling() -> None:
    ceilings = Ceilings(operations_per_s=100.0, bytes_per_s=10.0)
    assert (Cost(200.0, 10.0).floor_s(ceilings), Cost(200.0, 10.0).bound(ceilings)) == (2.0, "compute")
    assert (Cost(200.0, 30.0).floor_s(ceilings), Cost(200.0, 30.0).bound(ceilings)) == (3.0, "memory")


def test_a_profile_has_every_stage_and_they_add_up(model_dir: Path, adapter_specs: list[AdapterSpec]) -> None:
    adapters = [ref(spec.path) for spec in adapter_specs[:2]]
    config = EngineConfig(model_dir, slots=2, base_aliases=("*",))
    found = profile(config, adapters, [50, 20, 30], repeats=3)
    assert tuple(stage.name for stage in found.stages) == STAGES
    assert {stage.name: stage.calls for stage in found.stages} == {
        "embed": 1, "norm": 8, "qkv": 4, "attention": 4, "o": 4, "gate_up": 4, "down": 4, "pool": 1
    }  # fmt: skip
    assert all(stage.ms > 0 for stage in found.stages)
    assert all(stage.floor_ms > 0 for stage in found.stages if stage.name != "pool")
    assert 0 < sum(stage.ms for stage in found.stages) < 10 * found.base_ms
    assert (found.tokens, found.prompts, found.adapters, found.backend) == (100, 3, 2, "native")
    assert next(stage.name for stage in found.stages if stage.lora_floor_ms > 0) == "qkv"


def test_a_batch_beyond_the_settings_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="at most 64 tokens"):
        profile(EngineConfig(model_dir, max_batch_tokens=64), [], [65])
