"""Which adapters' merged weights are kept between batches, and how many."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels import kept_merges
from ranklet.kernels.batch import LoraBatch, plan
from ranklet.kernels.kept_merges import KeptMerges
from ranklet.kernels.merged import Merged
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import LinearStack, SlotMeta
from tests.kernels import oracle
from tests.kernels.adapters import LINEAR, NAN, QKV, RANKS, SLOTS, WIDE, batch_of, slots_by_row, stack_of

BYTES = sum(QKV) * WIDE * 4  # of one merged weight


def kept_backend(budget: int = 100 * BYTES) -> Merged:
    """Return a backend for which a slot dominates after one batch of that slot only."""
    backend = Merged(budget)
    backend.kept.half_life_batches = 1.0
    return backend


def run(backend: Merged, weight: Tensor, stack: LinearStack, adapters: oracle.Adapters, batch: LoraBatch) -> None:
    """Compute a batch and compare it with float64."""
    backend.observe(batch)
    x = torch.randn(batch.rows, WIDE)
    y = backend.linear(x, weight, None, stack, batch)
    assert_close(y.double(), oracle.linear(x, weight, None, slots_by_row(batch), adapters), rtol=1e-5, atol=1e-5)


def load(stack: LinearStack, adapters: oracle.Adapters, slot: int, seed: int) -> None:
    """Load another adapter of the same ranks into a slot, as the pool does: new weights, new metadata."""
    adapters |= oracle.random_adapters({slot: RANKS[slot]}, WIDE, QKV, seed=seed)
    fresh = stack_of({slot: adapters[slot]})
    stack.a[slot], stack.b[slot] = fresh.a[slot], fresh.b[slot]
    stack.describe(slot, fresh.meta[slot])


def test_a_kept_merge_is_used_without_merging_again() -> None:
    backend, weight, stack = kept_backend(), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    run(backend, weight, stack, LINEAR, batch_of(2))
    assert backend.kept.held_bytes == BYTES
    copy = backend.kept.find(2, weight, stack.meta[2])
    stack.a[2].fill_(NAN)  # the output would be NaN if A were read
    run(backend, weight, stack, LINEAR, batch_of(2))
    assert backend.kept.find(2, weight, stack.meta[2]) is copy


def test_each_projection_has_its_own_merge() -> None:
    backend, stack = kept_backend(), stack_of(LINEAR)
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(3)]
    for weight in (*weights, *weights):
        run(backend, weight, stack, LINEAR, batch_of(2))
    assert backend.kept.held_bytes == 3 * BYTES


def test_another_adapter_in_the_slot_gets_its_own_weights_and_share() -> None:
    backend, weight, adapters = kept_backend(), torch.randn(sum(QKV), WIDE), dict(LINEAR)
    stack = stack_of(adapters)
    run(backend, weight, stack, adapters, batch_of(2))
    load(stack, adapters, 2, seed=7)
    run(backend, weight, stack, adapters, batch_of(2))
    assert (backend.kept.held_bytes, backend.kept.share(2), backend.kept.dominates(2)) == (0, 0.0, False)
    run(backend, weight, stack, adapters, batch_of(2))
    assert backend.kept.held_bytes == BYTES


def test_without_a_budget_nothing_is_kept() -> None:
    backend = Merged()
    for _ in range(9):
        run(backend, torch.randn(sum(QKV), WIDE), stack_of(LINEAR), LINEAR, batch_of(2))
    assert (backend.kept.held_bytes, backend.kept.dominates(2)) == (0, False)


def test_a_slot_dominates_by_its_moving_average_with_hysteresis() -> None:
    kept = KeptMerges(BYTES, half_life_batches=2.0, enter=0.3, leave=0.1)
    kept.observe(batch_of(1))
    assert kept.share(1) == pytest.approx(1 - 0.5**0.5)
    assert not kept.dominates(1)
    kept.observe(LoraBatch((), rows=9))  # no LoRA rows: shares do not change
    kept.observe(batch_of(1, rows=1000))
    assert kept.share(1) == pytest.approx(0.5)
    assert kept.dominates(1)
    others = LoraBatch((Segment(2, 0, 1), Segment(3, 1, 4)), rows=9)
    for share in (0.25, 0.125):
        kept.observe(others)
        kept.observe(others)
        assert kept.share(1) == pytest.approx(share)
        assert kept.dominates(1)
    assert kept.share(3) == pytest.approx(3 * kept.share(2))
    kept.observe(others)
    assert (kept.share(1) < 0.1, kept.dominates(1), kept.dominates(3)) == (True, False, True)
    kept.observe(LoraBatch((Segment(1, 0, 1), Segment(3, 1, 4)), rows=4))
    assert (0.1 < kept.share(1) < 0.3, kept.dominates(1)) == (True, False)


def test_a_slot_that_stops_dominating_frees_its_merges() -> None:
    backend, stack, weight = kept_backend(), stack_of(LINEAR), torch.randn(sum(QKV), WIDE)
    run(backend, weight, stack, LINEAR, batch_of(2))
    for _ in range(3):
        assert backend.kept.find(2, weight, stack.meta[2]) is not None
        backend.observe(batch_of(5))
    backend.observe(batch_of(5))
    assert backend.kept.find(2, weight, stack.meta[2]) is None
    assert backend.kept.held_bytes == 0


def shared(**rows: int) -> LoraBatch:
    segments, start = [], 0
    for slot, count in rows.items():
        segments.append(Segment(int(slot[1:]), start, start + count))
        start += count
    return LoraBatch(tuple(segments), rows=start)


def fill(out: Tensor) -> None:
    out.zero_()


def test_the_least_dominating_slots_are_evicted_and_no_more_than_needed() -> None:
    kept = KeptMerges(4 * BYTES, half_life_batches=1e-3, enter=0.1, leave=0.05)
    metas = {slot: SlotMeta((1,), (1.0,)) for slot in range(4)}
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(5)]

    def holders() -> dict[int, int]:
        return {slot: sum(kept.find(slot, weight, metas[slot]) is not None for weight in weights) for slot in metas}

    kept.observe(shared(s1=19, s2=30, s3=51))
    for weight in weights[:2]:
        assert kept.add(1, weight, metas[1], fill) is not None
        assert kept.add(2, weight, metas[2], fill) is not None
    assert kept.add(2, weights[2], metas[2], fill) is not None  # 30 displaces 19
    assert holders() == {0: 0, 1: 1, 2: 3, 3: 0}
    assert kept.add(1, weights[2], metas[1], fill) is None
    assert kept.add(0, weights[0], metas[0], fill) is None  # never seen
    assert kept.add(3, weights[0], metas[3], fill) is not None
    assert kept.add(3, weights[1], metas[3], fill) is not None
    assert holders() == {0: 0, 1: 0, 2: 2, 3: 2}
    assert kept.held_bytes == 4 * BYTES
    kept.observe(shared(s2=49, s3=51))  # a share too similar to displace the other
    assert kept.add(3, weights[2], metas[3], fill) is None
    big = torch.randn(5 * sum(QKV), WIDE)
    kept.observe(shared(s2=20, s3=80))
    assert kept.add(3, big, metas[3], fill) is None  # eviction would not free enough
    assert holders() == {0: 0, 1: 0, 2: 2, 3: 2}


def test_a_slot_never_evicts_its_own_merges() -> None:
    kept = KeptMerges(BYTES, displace=1.0, half_life_batches=1.0)
    meta, first, second = SlotMeta((1,), (1.0,)), torch.randn(sum(QKV), WIDE), torch.randn(sum(QKV), WIDE)
    kept.observe(batch_of(0))
    assert kept.add(0, first, meta, fill) is not None
    assert kept.add(0, second, meta, fill) is None
    assert kept.find(0, first, meta) is not None


def test_a_negligible_number_of_rows_is_not_counted() -> None:
    kept = KeptMerges(BYTES)
    kept.observe(shared(s0=991, s1=9))
    kept.observe(shared(s0=990, s2=10))
    assert kept.share(1) == 0.0
    assert kept.share(2) == pytest.approx(0.01 * (1 - 0.5 ** (1 / 32)))


def test_drop_frees_everything_and_halves_the_budget() -> None:
    backend, stack = kept_backend(5 * BYTES), stack_of(LINEAR)
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(3)]
    for weight in weights:
        run(backend, weight, stack, LINEAR, batch_of(2))
    assert backend.drop() == 3 * BYTES
    assert (backend.kept.held_bytes, backend.kept.max_bytes, backend.kept.dominates(2)) == (0, 5 * BYTES // 2, False)
    for weight in weights:
        run(backend, weight, stack, LINEAR, batch_of(2))
    assert backend.kept.held_bytes == 2 * BYTES
    assert backend.drop() == 2 * BYTES
    assert backend.drop() == 0


def test_running_out_of_memory_drops_all_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, stack = kept_backend(), stack_of(LINEAR)
    first, second = torch.randn(sum(QKV), WIDE), torch.randn(sum(QKV), WIDE)
    run(backend, first, stack, LINEAR, batch_of(2))
    refused, make = [], kept_merges.empty

    def full_device(weight: Tensor, count: int = 1) -> Tensor:
        if backend.kept.held_bytes:
            refused.append(weight)
            raise torch.OutOfMemoryError("the device is full")
        return make(weight, count)

    monkeypatch.setattr(kept_merges, "empty", full_device)
    run(backend, second, stack, LINEAR, batch_of(2))
    assert [weight is second for weight in refused] == [True]
    assert (backend.kept.held_bytes, backend.kept.max_bytes) == (0, 50 * BYTES)


@pytest.mark.parametrize(
    "wrong",
    [{"max_bytes": -1}, {"half_life_batches": 0.0}, {"enter": 0.1, "leave": 0.1}, {"enter": 1.1}, {"displace": 0.9}],
    ids=lambda wrong: "-".join(wrong),
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="kept merges: expected"):
        KeptMerges(**{"max_bytes": 1, **wrong})  # type: ignore[arg-type]


Act = tuple[Literal["run", "load", "drop"], list[int], int]
acts = st.tuples(st.sampled_from(["run"] * 8 + ["load", "load", "drop"]), st.permutations(range(5)), st.integers(0, 99))


@settings(max_examples=40)
@given(st.integers(0, 6), st.lists(acts, max_size=25))
def test_any_history_stays_within_the_budget_and_serves_the_current_adapters(budget: int, history: list[Act]) -> None:
    backend, adapters = kept_backend(budget * BYTES), dict(LINEAR)
    stacks = [stack_of(adapters), stack_of(adapters)]
    weights = [torch.randn(sum(QKV), WIDE) for _ in stacks]
    for act, slots, number in history:
        if act == "load":
            for stack in stacks:
                load(stack, adapters, slots[0], seed=number)
        elif act == "drop":
            backend.drop()
        else:
            batch = plan([1 + number % 7, 1, 2], [slots[0], slots[1], None])[1]
            for stack, weight in zip(stacks, weights, strict=True):
                run(backend, weight, stack, adapters, batch)
        assert backend.kept.held_bytes <= backend.kept.max_bytes <= budget * BYTES
    kept = backend.kept
    holders = [
        slot
        for stack, weight in zip(stacks, weights, strict=True)
        for slot in range(SLOTS)
        if kept.find(slot, weight, stack.meta[slot]) is not None
    ]
    assert len(holders) * BYTES == kept.held_bytes
    assert all(kept.dominates(slot) for slot in holders)
