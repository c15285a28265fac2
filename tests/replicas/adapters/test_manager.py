"""Slots, loader and demand together: with a real pool, and batches played by `acquire` and `release`."""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from ranklet.replicas.adapters import manager
from ranklet.replicas.adapters.loader import Loader, LoadOutcome
from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.adapters.slots import SlotTable
from ranklet.replicas.adapters.verify import ExpectedModules
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter
from tests.assets.broken import edit_config, sound
from tests.assets.make import AdapterSpec
from tests.replicas.asking import PATIENCE_S, ref


class Scene:
    """A residency whose finished loads are settled when the test says so."""

    def __init__(self, pool: AdapterPool, expectation: ExpectedModules, slots: int) -> None:
        self.outcomes: queue.Queue[LoadOutcome] = queue.Queue()
        self.evicted: list[str] = []
        self.loader = Loader(pool, expectation, 1 << 30)
        self.residency = AdapterManager(SlotTable(slots), self.loader, self.outcomes.put, self.evicted.append)

    def settle(self) -> tuple[Future[AdapterInfo] | None, AdapterInfo | None]:
        return self.residency.settle(self.outcomes.get(timeout=PATIENCE_S))

    def bring(self, *refs: AdapterRef) -> None:
        """Demand, then every load that it starts."""
        self.residency.bring(refs)
        for _ in [each for each in refs if not self.residency.usable(each)]:
            if self.residency.table.holds(refs[0]):
                self.settle()


@pytest.fixture
def scene(make_pool: Callable[[], AdapterPool], expectation: ExpectedModules) -> Iterator[Scene]:
    made = Scene(make_pool(), expectation, slots=1)
    yield made
    made.loader.stop()


@pytest.fixture
def refs(adapter_specs: list[AdapterSpec]) -> list[AdapterRef]:
    return [ref(spec.path) for spec in adapter_specs]


def test_tiers_follow_the_adapter(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    assert scene.residency.tier(one) == "disk"
    scene.bring(one)
    assert scene.residency.tier(one) == "gpu"
    scene.bring(two)
    assert (scene.residency.tier(one), scene.residency.tier(two)) == ("host", "gpu")
    assert scene.evicted == [one.name]


def test_who_asked_is_told(scene: Scene, refs: list[AdapterRef], adapter_specs: list[AdapterSpec]) -> None:
    spec = adapter_specs[0]
    future = scene.residency.ask(refs[0])
    assert scene.residency.ask(refs[0]) is future
    scene.residency.bring([])
    asked, info = scene.settle()
    assert asked is future
    assert info is not None
    assert (info.name, info.rank, set(info.modules)) == (spec.name, spec.rank, set(spec.targets))
    assert info.bytes == sum(
        4 * 4 * (spec.rank * (wide + out)) for wide, out in ((128, 192), (128, 96), (128, 96), (192, 128))
    )
    assert scene.residency.ask(refs[0]).result(0) == info


def test_an_adapter_in_use_keeps_its_slot_until_the_batch_lands(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.bring(one)
    scene.residency.acquire([one, None])
    scene.residency.bring([two])
    assert not scene.residency.table.holds(two)
    assert not scene.residency.usable(one), "no new work, or the slot would never come free"
    scene.residency.release([one, None])
    scene.bring(two)
    assert scene.residency.usable(two)


def test_an_older_demand_is_not_evicted_for_a_younger(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.bring(one)
    scene.residency.bring([one, two])
    assert scene.residency.usable(one)
    assert not scene.residency.table.holds(two)


def test_the_proposed_batchs_adapters_are_not_evicted_from_under_it(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.bring(one)
    scene.residency.bring([two], [None, one])
    assert scene.residency.acquire([None, one]) == [None, 0]
    scene.residency.release([None, one])
    scene.bring(two)
    assert scene.residency.usable(two), "but it leaves after that batch"


def test_an_offer_takes_a_free_slot_or_none(
    scene: Scene, refs: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = refs[:2]
    scene.residency.offer(one)
    scene.settle()
    assert scene.residency.usable(one)
    scene.residency.offer(two)
    assert not scene.residency.table.holds(two), "the other has just come"
    monkeypatch.setattr(manager, "LATELY_S", 0.0)
    scene.residency.offer(two, needed=[None, one])
    assert not scene.residency.table.holds(two), "the other is waited for"
    scene.residency.offer(two)
    scene.settle()
    assert scene.residency.usable(two)
    assert scene.evicted == [one.name]


def test_a_retired_adapter_is_served_again_when_nobody_needs_its_slot(scene: Scene, refs: list[AdapterRef]) -> None:
    """The prompt it had to make room for was cancelled: its own prompts must not wait for ever."""
    one, two = refs[:2]
    scene.bring(one)
    scene.residency.acquire([one])
    scene.residency.bring([two])
    scene.residency.release([one])
    scene.residency.bring([one])  # two's client has gone
    assert scene.residency.usable(one)


def test_asking_for_a_retired_adapter_answers(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.bring(one)
    scene.residency.acquire([one])
    scene.residency.bring([two])
    future = scene.residency.ask(one)
    scene.residency.release([one])
    scene.residency.bring([])
    assert future.result(0).name == one.name


def test_a_refusal_is_remembered_for_that_revision_alone(scene: Scene, model_dir: Path, tmp_path: Path) -> None:
    folder = edit_config(sound(model_dir, tmp_path / "bad"), bias="all")
    bad = ref(folder)
    scene.residency.bring([bad])
    _, info = scene.settle()
    assert info is None
    assert isinstance(scene.residency.refusal(bad), InvalidAdapter)
    assert not scene.residency.table.holds(bad)
    good = ref(edit_config(folder, bias="none"))
    assert good.revision != bad.revision
    assert scene.residency.refusal(good) is None
    scene.bring(good)
    assert scene.residency.usable(good)


def test_a_missing_folder_is_looked_for_again(scene: Scene, tmp_path: Path, model_dir: Path) -> None:
    late = AdapterRef("late", str(tmp_path / "late"), "1")
    scene.residency.bring([late])
    outcome = scene.outcomes.get(timeout=PATIENCE_S)
    assert isinstance(outcome.error, AdapterNotFound)
    scene.residency.settle(outcome)
    assert scene.residency.refusal(late) is None
    sound(model_dir, tmp_path / "late")
    scene.bring(late)
    assert scene.residency.usable(late)


def test_a_refusal_does_not_grow_as_it_is_raised_again(scene: Scene, model_dir: Path, tmp_path: Path) -> None:
    """Each raise adds frames, and their requests with them, to the traceback that an exception carries."""
    bad = ref(edit_config(sound(model_dir, tmp_path / "bad"), bias="all"))
    scene.residency.bring([bad])
    scene.settle()
    for _ in range(5):
        with pytest.raises(InvalidAdapter) as caught:
            _raise(scene.residency.refusal(bad))
    depth, trace = 0, caught.value.__traceback__
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    assert depth == 2


def _raise(error: Exception | None) -> None:
    assert error is not None
    raise error
