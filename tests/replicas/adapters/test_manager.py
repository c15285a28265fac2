"""The adapter manager with a real pool and loader; tests play the batches and decide when a load completes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.load_times import SLOT_PATIENCE_S
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import RECENTLY_USED_S, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.errors import (
    AdapterNotFound,
    InvalidAdapter,
    InvalidRequest,
    StillLoading,
    Unavailable,
)
from tests.assets.adapters import AdapterSpec
from tests.assets.broken import edit_config, sound
from tests.assets.hanging import hanging
from tests.replicas.adapters.scene import Scene, Waiting
from tests.replicas.asking import ref


@pytest.fixture
def scene(make_pool: Callable[[], AdapterPool], expectation: ExpectedModules) -> Iterator[Scene]:
    made = Scene(make_pool(), expectation, slots=1)
    yield made
    made.manager.stop()


@pytest.fixture
def refs(adapter_specs: list[AdapterSpec]) -> list[AdapterRef]:
    return [ref(spec.path) for spec in adapter_specs]


@pytest.fixture
def bad(model_dir: Path, tmp_path: Path) -> AdapterRef:
    return ref(edit_config(sound(model_dir, tmp_path / "bad"), bias="some"))


def test_tiers_follow_the_adapter(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    assert scene.manager.tier(one) == "disk"
    scene.load(one)
    assert scene.manager.tier(one) == "gpu"
    scene.load(two)
    assert (scene.manager.tier(one), scene.manager.tier(two)) == ("host", "gpu")
    assert scene.evicted == [one.name]


def test_a_requested_load_resolves_its_future(
    scene: Scene, refs: list[AdapterRef], adapter_specs: list[AdapterSpec]
) -> None:
    spec = adapter_specs[0]
    future = scene.manager.request_load(refs[0])
    assert scene.manager.request_load(refs[0]) is future
    scene.manager.start_loads([])
    assert not future.done()
    scene.complete()
    info = future.result(0)
    assert (info.name, info.rank, set(info.modules)) == (spec.name, spec.rank, set(spec.targets))
    assert info.bytes == sum(
        4 * 4 * (spec.rank * (wide + out)) for wide, out in ((128, 192), (128, 96), (128, 96), (192, 128))
    )
    assert scene.manager.request_load(refs[0]).result(0) == info


def test_a_failed_load_fails_its_future_and_the_requests_that_wait_for_it(
    scene: Scene, refs: list[AdapterRef], bad: AdapterRef
) -> None:
    future, waiting, other = scene.manager.request_load(bad), Waiting(), Waiting()
    scene.waiting = {bad: [waiting], refs[0]: [other]}
    scene.manager.start_loads([])
    record = scene.complete()
    assert (record.adapter, record.rank, record.error) == (bad.name, 0, "invalid_adapter")
    assert isinstance(future.exception(0), InvalidAdapter)
    assert waiting.error is future.exception(0)
    assert other.error is None


def test_a_stopping_engine_refuses_the_loads_that_are_requested(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    future, error = scene.manager.request_load(one), Unavailable("stopping")
    scene.manager.start_loads([])
    scene.manager.refuse_loads(error)
    assert future.exception(0) is error
    assert scene.manager.request_load(two).exception(0) is error
    scene.complete()
    assert scene.manager.usable(one)


def test_requests_expire_while_their_adapter_loads_or_waits_for_a_loader_thread(
    make_pool: Callable[[], AdapterPool], expectation: ExpectedModules, refs: list[AdapterRef],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scene = Scene(make_pool(), expectation, slots=2)
    early, late = Waiting(), Waiting()
    scene.waiting = {refs[0]: [early], refs[1]: [late]}
    scene.manager.start_loads(refs[:1])
    scene.now_s = 5.0
    monkeypatch.setattr(scene.loader, "can_start", lambda ref: False)
    scene.manager.start_loads(refs[:2])
    scene.now_s = 10.0
    scene.manager.start_loads(refs[:2])
    scene.manager.expire(8.0)
    assert isinstance(early.error, StillLoading)
    assert late.error is None
    scene.now_s = 14.0
    scene.manager.expire(8.0)
    assert isinstance(late.error, StillLoading)
    scene.complete()
    assert scene.manager.usable(refs[0]), "the load goes on"
    scene.manager.stop()


@pytest.mark.parametrize("taken", [False, True])
def test_a_slow_load_gives_its_slot_back_until_its_files_are_read(
    taken: bool, scene: Scene, refs: list[AdapterRef], adapter_specs: list[AdapterSpec], tmp_path: Path
) -> None:
    slow, other = ref(shutil.copytree(adapter_specs[0].path, tmp_path / "slow")), refs[1]
    waits = Waiting()
    scene.waiting = {slow: [waits]}
    with hanging(tmp_path / "slow" / WEIGHTS_FILE):
        scene.manager.start_loads([slow])
        scene.now_s = SLOT_PATIENCE_S
        scene.manager.expire(60.0)
        assert scene.manager.held().used_slots == 1
        scene.now_s += 0.1
        scene.manager.expire(60.0)
        scene.manager.start_loads([slow])  # does not begin a second load
        scene.manager.prefetch(slow)
        assert (scene.manager.held().loading, scene.manager.held().used_slots) == (("slow",), 0)
        assert not scene.manager.release_adapter("slow", None, ()), "its load still runs"
        if taken:
            scene.load(other)
            scene.manager.acquire_slots([other])
    record = scene.complete()
    assert (record.adapter, record.error) == ("slow", "adapter_loading" if taken else None)
    if taken:
        assert waits.error is None, "its requests still wait"
        scene.manager.release_slots([other])
        scene.load(slow)
        assert scene.records[-1].tier == "host"
    assert scene.manager.usable(slow)


def test_an_adapter_in_use_keeps_its_slot_until_its_batch_ends(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.load(one)
    scene.manager.acquire_slots([one, None])
    scene.manager.start_loads([two])
    assert not scene.has_slot(two)
    assert not scene.manager.usable(one), "without new work, or the slot would never become free"
    scene.manager.release_slots([one, None])
    scene.load(two)
    assert scene.manager.usable(two)


def test_an_adapter_wanted_earlier_is_not_evicted_for_a_later_one(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.load(one)
    scene.manager.start_loads([one, two])
    assert scene.manager.usable(one)
    assert not scene.has_slot(two)


def test_adapters_of_the_next_batch_are_not_evicted(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.load(one)
    scene.manager.start_loads([two], [None, one])
    assert scene.manager.acquire_slots([None, one]) == [None, 0]
    scene.manager.release_slots([None, one])
    scene.load(two)
    assert scene.manager.usable(two), "evicted after that batch"


def test_a_prefetch_evicts_no_adapter_that_is_needed_or_was_used_recently(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.manager.prefetch(one)
    scene.complete()
    assert scene.manager.usable(one)
    assert scene.manager.held().used_slots == 1
    scene.manager.prefetch(two)
    assert not scene.has_slot(two), "one was loaded just now"
    scene.now_s = RECENTLY_USED_S
    assert scene.manager.held().used_slots == 0
    scene.manager.prefetch(two, needed=[None, one])
    assert not scene.has_slot(two), "one is needed"
    scene.manager.prefetch(two)
    scene.complete()
    assert scene.manager.usable(two)
    assert scene.evicted == [one.name]


def test_a_prefetch_does_not_take_the_slot_that_a_prompt_waits_for(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two, three = refs[:3]
    scene.load(one)
    scene.manager.acquire_slots([one])
    scene.manager.start_loads([two])
    scene.manager.release_slots([one])
    scene.manager.prefetch(three)
    assert not scene.has_slot(three)
    scene.load(two)
    assert scene.manager.usable(two)


def test_a_retiring_adapter_is_served_again_when_its_slot_is_no_longer_needed(
    scene: Scene, refs: list[AdapterRef]
) -> None:
    one, two = refs[:2]
    scene.load(one)
    scene.manager.acquire_slots([one])
    scene.manager.start_loads([two])
    scene.manager.release_slots([one])
    scene.manager.start_loads([one])  # the request for two was cancelled
    assert scene.manager.usable(one)


def test_a_requested_load_of_a_retiring_adapter_resolves(scene: Scene, refs: list[AdapterRef]) -> None:
    one, two = refs[:2]
    scene.load(one)
    scene.manager.acquire_slots([one])
    scene.manager.start_loads([two])
    future = scene.manager.request_load(one)
    scene.manager.release_slots([one])
    scene.manager.start_loads([])
    assert future.result(0).name == one.name


def test_only_the_refused_revision_is_remembered(scene: Scene, bad: AdapterRef) -> None:
    scene.load(bad)
    assert isinstance(scene.manager.refusal(bad), InvalidAdapter)
    assert not scene.has_slot(bad)
    good = ref(edit_config(Path(bad.path), bias="none"))
    assert good.revision != bad.revision
    assert scene.manager.refusal(good) is None
    scene.load(good)
    assert scene.manager.usable(good)


def test_a_missing_folder_is_looked_up_again(scene: Scene, tmp_path: Path, model_dir: Path) -> None:
    late = AdapterRef("late", str(tmp_path / "late"), "1")
    scene.manager.start_loads([late])
    assert scene.complete().error == AdapterNotFound.code
    assert scene.manager.refusal(late) is None
    sound(model_dir, tmp_path / "late")
    scene.load(late)
    assert scene.manager.usable(late)


def test_the_traceback_of_a_refusal_does_not_grow(scene: Scene, bad: AdapterRef) -> None:
    """Each raise adds frames, and the requests in them, to the traceback of an exception."""
    scene.load(bad)
    for _ in range(5):
        with pytest.raises(InvalidAdapter) as caught:
            _raise(scene.manager.refusal(bad))
    depth, trace = 0, caught.value.__traceback__
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    assert depth == 2


def _raise(error: Exception | None) -> None:
    assert error is not None
    raise error


def test_a_report_lists_each_revision_once(scene: Scene, refs: list[AdapterRef], bad: AdapterRef) -> None:
    one, two, three = refs[:3]
    scene.load(bad)
    scene.load(one)
    scene.manager.start_loads([two])
    reports = {report.name: report for report in scene.manager.report({one: 2, three: 1})}
    assert {name: report.where for name, report in reports.items()} == {
        bad.name: "refused", one.name: "host", two.name: "loading", three.name: "disk",
    }  # fmt: skip
    assert [reports[each.name].references for each in (bad, one, two, three)] == [0, 2, 0, 1]
    assert "bias" in (reports[bad.name].error or "")
    scene.complete()
    (report,) = [report for report in scene.manager.report({}) if report.where == "gpu"]
    assert report.info == scene.manager.request_load(two).result(0)


def test_a_released_adapter_keeps_the_named_revision_and_what_is_in_use(scene: Scene, refs: list[AdapterRef]) -> None:
    one = refs[0]
    scene.load(one)
    assert scene.manager.release_adapter(one.name, one.revision, []), "nothing but the kept revision"
    assert scene.manager.usable(one)
    scene.manager.acquire_slots([one])
    assert not scene.manager.release_adapter(one.name, None, [one])
    scene.manager.release_slots([one])
    assert scene.manager.release_adapter(one.name, None, [])
    assert scene.manager.tier(one) == "disk"


def test_pinned_adapters_leave_a_slot_for_others(
    make_pool: Callable[[], AdapterPool], expectation: ExpectedModules, refs: list[AdapterRef]
) -> None:
    scene = Scene(make_pool(), expectation, slots=2)
    one, two, three = refs[:3]
    with pytest.raises(InvalidRequest, match=r"engine\.slots"):
        scene.manager.pin([one.name, two.name])
    scene.manager.pin([one.name])
    for each in (one, two, three):
        scene.load(each)
    assert scene.evicted == [two.name]
    scene.manager.stop()
