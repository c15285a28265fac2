"""Every load ends in an outcome, from disk or from the host cache, also if it fails."""

import queue
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.loader import COPIERS, Loader, LoadOutcome
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.errors import AdapterNotFound, InternalError, InvalidAdapter
from tests.assets.adapters import AdapterSpec
from tests.assets.broken import BROKEN
from tests.replicas.asking import PATIENCE_S, ref


def load(loader: Loader, wanted: AdapterRef, slot: int = 0) -> LoadOutcome:
    done: queue.Queue[LoadOutcome] = queue.Queue()
    loader.start(wanted, lambda ref, rows: slot, done.put)
    return done.get(timeout=PATIENCE_S)


@pytest.fixture
def make_loader(
    make_pool: Callable[[], AdapterPool], expectation: ExpectedModules
) -> Callable[[int], tuple[Loader, AdapterPool]]:
    def make(budget: int) -> tuple[Loader, AdapterPool]:
        pool = make_pool()
        return Loader(pool, expectation, budget), pool

    return make


MakeLoader = Callable[[int], tuple[Loader, AdapterPool]]


def test_a_second_load_copies_the_same_adapter_from_the_host_cache(
    make_loader: MakeLoader, adapter_specs: list[AdapterSpec]
) -> None:
    (loader, pool), wanted = make_loader(1 << 30), ref(adapter_specs[0].path)
    first, second = load(loader, wanted, 0), load(loader, wanted, 1)
    assert (first.tier, second.tier) == ("disk", "host")
    assert isinstance(first.result, AdapterInfo)
    assert first.result == second.result
    assert loader.host.nbytes == first.result.bytes
    for stacks in pool.layers:
        assert stacks.qkv is not None
        assert torch.equal(stacks.qkv.a[0], stacks.qkv.a[1])
        assert stacks.qkv.a[0].any()
    loader.stop()


def test_a_load_from_the_host_cache_never_reads_the_disk(
    make_loader: MakeLoader, adapter_specs: list[AdapterSpec]
) -> None:
    """The cache drops the adapter while the load waits for a thread."""
    (loader, _), wanted = make_loader(1 << 30), ref(adapter_specs[0].path)
    load(loader, wanted)
    done: queue.Queue[LoadOutcome] = queue.Queue()
    go_on = Event()

    def claim(ref: AdapterRef, rows: int) -> None:
        go_on.wait(PATIENCE_S)

    for _ in range(COPIERS):
        loader.start(wanted, claim, lambda outcome: None)
    loader.start(wanted, lambda ref, rows: 0, done.put)
    loader.host.drop(wanted)
    go_on.set()
    assert done.get(timeout=PATIENCE_S).tier == "host"
    loader.stop()


def test_without_a_host_cache_every_load_is_from_disk(
    make_loader: MakeLoader, adapter_specs: list[AdapterSpec]
) -> None:
    loader, _ = make_loader(0)
    wanted = ref(adapter_specs[0].path)
    assert [load(loader, wanted).tier for _ in range(2)] == ["disk", "disk"]
    assert loader.host.refs() == ()
    loader.stop()


def test_a_refused_adapter_is_an_outcome_and_is_not_cached(
    make_loader: MakeLoader, model_dir: Path, tmp_path: Path
) -> None:
    loader, _ = make_loader(1 << 30)
    bad = ref(BROKEN["nan"].make(model_dir, tmp_path / "nan"))
    assert isinstance(load(loader, bad).result, InvalidAdapter)
    assert isinstance(load(loader, AdapterRef("gone", str(tmp_path / "gone"), "1")).result, AdapterNotFound)
    assert loader.host.refs() == ()
    loader.stop()


def test_the_loader_goes_on_after_a_defect(make_loader: MakeLoader, adapter_specs: list[AdapterSpec]) -> None:
    loader, _ = make_loader(1 << 30)
    wanted = ref(adapter_specs[0].path)
    for _ in range(3):
        outcome = load(loader, wanted, slot=99)  # there is no such slot
        assert isinstance(outcome.result, InternalError)
        assert wanted.name in outcome.result.message
    assert isinstance(load(loader, wanted, slot=0).result, AdapterInfo)
    loader.stop()
