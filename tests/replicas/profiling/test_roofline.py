"""Costs equal those worked out by hand for Qwen3-Embedding-0.6B and 5 x 6144 tokens."""

from dataclasses import replace

import pytest

from ranklet.replicas.model.modules import EMBEDDING, Module
from ranklet.replicas.profiling.roofline import STAGES, AdapterShare, BatchShape, Ceilings, Cost, base_costs, lora_costs
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B

T = 5 * 6144
LONG = BatchShape([6144] * 5, last_only=False, element_bytes=2)


def test_products_count_their_operations_and_bytes() -> None:
    found = base_costs(QWEN3_EMBEDDING_06B, LONG)
    assert found["qkv"].operations == 28 * 2 * T * 1024 * 4096
    assert found["qkv"].bytes == 28 * 2 * (T * 1024 + T * 4096 + 1024 * 4096)
    assert found["gate_up"].operations == 28 * 2 * T * 1024 * 6144
    assert found["gate_up"].bytes == 28 * 2 * (T * 1024 + T * 3072 + 1024 * 6144), "it writes only the activation"
    assert found["attention"].operations == pytest.approx(28 * 5 * 2 * 6144**2 * 16 * 128, rel=1e-3)


def test_floors_of_products_equal_times_measured_on_an_h200() -> None:
    """A layer's qkv took 0.349 ms at 738 TFLOP/s, its attention 1.31 ms at 588 TFLOP/s."""
    found = base_costs(QWEN3_EMBEDDING_06B, LONG)
    assert found["qkv"].floor_s(Ceilings(738e12, 4.29e12)) / 28 == pytest.approx(0.349e-3, rel=0.01)
    assert found["attention"].floor_s(Ceilings(588e12, 4.29e12)) / 28 == pytest.approx(1.31e-3, rel=0.01)


def test_pointwise_stages_count_bytes() -> None:
    found = base_costs(QWEN3_EMBEDDING_06B, LONG)
    assert found["embed"].bytes == T * 1024 * (2 + 4)
    first, others = T * 1024 * (4 + 2), 55 * T * 1024 * (2 + 4 + 4 + 2)
    assert found["norm"].bytes == first + others
    assert found["pool"].bytes == 1024 * (T * (4 + 2) + 5 * 4)
    assert all(found[stage].operations == 0 for stage in ("embed", "norm", "pool"))
    assert set(found) == set(STAGES)


def test_a_window_limits_the_pairs_of_attention() -> None:
    sliding = replace(QWEN3_EMBEDDING_06B, windows=(1024,) * 28)
    pairs = 1024 * 1025 // 2 + (6144 - 1024) * 1024
    assert base_costs(sliding, LONG)["attention"].operations == 28 * 5 * pairs * 4 * 16 * 128
    wide = replace(QWEN3_EMBEDDING_06B, windows=(8192,) * 28)
    assert base_costs(wide, LONG) == base_costs(QWEN3_EMBEDDING_06B, LONG)


def test_the_last_layer_costs_less_if_only_last_tokens_are_read() -> None:
    whole = base_costs(QWEN3_EMBEDDING_06B, LONG)
    less = base_costs(QWEN3_EMBEDDING_06B, replace(LONG, last_only=True))
    assert less["qkv"] == whole["qkv"]
    for stage in ("o", "gate_up", "down"):
        assert less[stage].operations / whole[stage].operations == pytest.approx(27 / 28, rel=1e-3)
    assert less["attention"].operations / whole["attention"].operations == pytest.approx(27 / 28, rel=1e-3)


def ranks(modules: tuple[str, ...], rank: int) -> dict[Module, int]:
    return {(layer, module): rank for layer in range(28) for module in modules}


def test_lora_costs_its_two_products() -> None:
    shares = [AdapterShare(6144, 1, ranks(ATTENTION, 64))] * 3 + [AdapterShare(2 * 6144, 2, ranks(ATTENTION, 64))]
    found = lora_costs(QWEN3_EMBEDDING_06B, replace(LONG, shares=shares))
    assert set(found) == {"qkv", "o"}
    assert found["qkv"] == Cost(28 * 2 * T * 64 * (3 * 1024 + 4096), 28 * 4 * 2 * 64 * (3 * 1024 + 4096))
    assert found["o"].operations == 28 * 2 * T * 64 * (2048 + 1024)
    assert lora_costs(QWEN3_EMBEDDING_06B, LONG) == {}


def test_each_adapter_counts_its_own_rows_and_ranks() -> None:
    shares = [AdapterShare(6144, 1, ranks(("q_proj",), 64)), AdapterShare(100, 1, ranks(("q_proj", "up_proj"), 8))]
    found = lora_costs(QWEN3_EMBEDDING_06B, replace(LONG, shares=shares))
    assert found["qkv"].operations == 28 * 2 * (6144 * 64 + 100 * 8) * (1024 + 2048)
    assert found["gate_up"].operations == 28 * 2 * 100 * 8 * (1024 + 3072)


def test_the_last_layer_adapts_only_last_tokens() -> None:
    shares = [AdapterShare(2 * 6144, 2, ranks(("q_proj", "down_proj"), 64))]
    found = lora_costs(QWEN3_EMBEDDING_06B, replace(LONG, shares=shares, last_only=True))
    assert found["qkv"].operations == 28 * 2 * 2 * 6144 * 64 * (1024 + 2048)
    assert found["down"].operations == 2 * (27 * 2 * 6144 + 2) * 64 * (3072 + 1024)


def test_merged_lora_costs_a_pass_over_the_weights() -> None:
    shares = [AdapterShare(6144, 1, ranks(("o_proj",), 64))] * 4
    found = lora_costs(QWEN3_EMBEDDING_06B, replace(LONG, shares=shares, merged=True))
    product, adapter = 2048 * 1024, 64 * (2048 + 1024)
    assert found["o"] == Cost(28 * 4 * 2 * 64 * product, 28 * 4 * 2 * (adapter + 2 * product))


def test_lora_of_the_embedding_reads_one_column_of_a_for_each_token() -> None:
    shares = [AdapterShare(6144, 1, {(EMBEDDING, "embed_tokens"): 16})]
    found = lora_costs(QWEN3_EMBEDDING_06B, replace(LONG, shares=shares))
    assert found == {"embed": Cost(2 * 6144 * 16 * 1024, 2 * 16 * (6144 + 1024))}


def test_the_slower_ceiling_sets_the_floor() -> None:
    ceilings = Ceilings(operations_per_s=100.0, bytes_per_s=10.0)
    assert (Cost(200.0, 10.0).floor_s(ceilings), Cost(200.0, 10.0).bound(ceilings)) == (2.0, "compute")
    assert (Cost(200.0, 30.0).floor_s(ceilings), Cost(200.0, 30.0).bound(ceilings)) == (3.0, "memory")
