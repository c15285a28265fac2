"""The engine through its public methods: correct answers in mixed steps, under load and after failures."""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.kernels import native, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef, LoadRecord
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.errors import (
    AdapterNotFound,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Saturated,
    Unavailable,
)
from tests.assets.adapters import save_adapter
from tests.assets.broken import BROKEN, edit_weights, sound
from tests.assets.corpus import TEXTS
from tests.assets.make import AdapterSpec
from tests.assets.oracle import cosine, reference_embedding
from tests.replicas.asking import PATIENCE_S, ask, assert_same, prompts, ref, submit, until

MakeEngine = Callable[..., Engine]
Prompts = list[NDArray[np.int32]]


@dataclass
class RecordingListener(Listener):
    """Keeps all records of an engine."""

    batches: list[BatchRecord] = field(default_factory=list)
    loads: list[LoadRecord] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    dropped: int = 0

    def batch(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def load(self, record: LoadRecord) -> None:
        self.loads.append(record)

    def evicted(self, adapter: str) -> None:
        self.gone.append(adapter)

    def tier_hit(self, tier: str) -> None:
        self.tiers.append(tier)

    def cancelled(self, requests: int) -> None:
        self.dropped += requests


@pytest.fixture(scope="module")
def expected(model_dir: Path, adapter_specs: list[AdapterSpec]) -> dict[str | None, NDArray[np.float32]]:
    """Reference vectors of TEXTS[:8] by adapter; None is the base model."""
    folders: dict[str | None, Path | None] = {None: None, **{spec.name: spec.path for spec in adapter_specs}}
    return {name: reference_embedding(model_dir, folder, TEXTS[:8]) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tokens(model_dir: Path) -> Prompts:
    return prompts(model_dir, TEXTS[:8])


Expected = dict[str | None, NDArray[np.float32]]


# Fidelity


def test_each_adapter_alone(
    engine: Engine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    for spec in adapter_specs:
        answer = ask(engine, tokens, ref(spec.path))
        assert_same(answer.result, expected[spec.name])
        assert answer.prompt_tokens == sum(map(len, tokens))
        assert answer.backend == "native"
    base = ask(engine, tokens)
    assert_same(base.result, expected[None])
    assert (base.backend, base.tier) == ("none", None)


def test_all_adapters_mixed_in_one_step(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    records = RecordingListener()
    engine = make_engine(listener=records, slots=6, max_batch_tokens=8192)
    engine.start()
    refs: list[AdapterRef | None] = [None, *(ref(spec.path) for spec in adapter_specs)]
    for each in refs:
        if each is not None:
            engine.load(each)
    with engine.paused():  # so that all requests are in the queue when the next step is planned
        asked = [(each, i, submit(engine, [tokens[i]], each)) for i in range(len(tokens)) for each in refs]
    for each, i, future in asked:
        assert_same(future.result(PATIENCE_S).result, expected[each.name if each else None][i : i + 1])
    until(lambda: len(records.batches) == 1)
    assert records.batches[0].adapters == 6
    assert records.batches[0].requests_by_adapter[""] == len(tokens)
    assert records.batches[0].tokens == 7 * sum(map(len, tokens))


def test_shortened_vectors_are_normalized_again(
    engine: Engine, model_dir: Path, adapter_specs: list[AdapterSpec], tokens: Prompts
) -> None:
    spec = adapter_specs[1]
    for width in (32, 100, 128):
        answer = ask(engine, tokens[:3], ref(spec.path), width)
        assert_same(answer.result, reference_embedding(model_dir, spec.path, TEXTS[:3], dimensions=width))
        np.testing.assert_allclose(np.linalg.norm(answer.result, axis=1), 1.0, rtol=1e-6)


def test_prompts_of_any_length_up_to_the_limit(
    model_dir: Path, make_engine: MakeEngine, adapter_specs: list[AdapterSpec]
) -> None:
    """A step holds one long prompt or some short ones. Every prompt is answered in full."""
    records = RecordingListener()
    engine = make_engine(listener=records, max_batch_tokens=600)
    engine.start()
    draw = np.random.default_rng(0)
    asked = [draw.integers(0, 1024, size, dtype=np.int32) for size in (1, 600, 599, 2, 300, 301, 17, 598, 3)]
    wanted = ref(adapter_specs[0].path)
    assert_same(ask(engine, asked, wanted).result, reference_embedding(model_dir, adapter_specs[0].path, asked))
    until(lambda: sum(record.tokens for record in records.batches) == sum(map(len, asked)))
    assert max(record.tokens for record in records.batches) <= 600
    assert engine.limits.max_model_len == 600
    with pytest.raises(InvalidRequest, match="601"):
        engine.submit([np.zeros(601, np.int32)], None, EmbedParams(), AnswerSink(print))


def test_other_prompts_of_a_step_do_not_change_an_answer(
    engine: Engine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    """The same prompt beside prompts of other adapters and lengths."""
    draw, wanted = np.random.default_rng(1), ref(adapter_specs[3].path)
    for spec in adapter_specs:
        with engine.paused():
            ours = submit(engine, tokens[:1], wanted)
            theirs = [
                submit(engine, [draw.integers(0, 1024, int(size), dtype=np.int32)], ref(spec.path))
                for size in (1, 40, 200)
            ]
        assert_same(ours.result(PATIENCE_S).result, expected[wanted.name][:1])
        assert all(np.isfinite(future.result(PATIENCE_S).result).all() for future in theirs)


# Pressure


def test_more_adapters_than_slots_under_many_threads(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    records = RecordingListener()
    engine = make_engine(listener=records, slots=2, max_batch_requests=7, host_cache_bytes=3_000_000)
    engine.start()
    refs: list[AdapterRef | None] = [None, *(ref(spec.path) for spec in adapter_specs)]
    draw = np.random.default_rng(2)
    plan = [(refs[int(draw.integers(7))], int(draw.integers(8)), int(draw.integers(1, 4))) for _ in range(150)]

    def one(job: tuple[AdapterRef | None, int, int]) -> None:
        wanted, first, count = job
        places = [(first + i) % 8 for i in range(count)]
        answer = ask(engine, [tokens[i] for i in places], wanted)
        assert_same(answer.result, expected[wanted.name if wanted else None][places])

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(one, plan))
    assert records.gone, "six adapters in two slots cause evictions"
    assert {load.tier for load in records.loads} == {"disk", "host"}
    assert all(load.error is None for load in records.loads)
    shot = engine.snapshot()
    assert (shot.waiting_requests, shot.waiting_tokens) == (0, 0)
    assert len(shot.resident) == 2
    assert shot.host_bytes <= 3_000_000
    assert max(record.adapters for record in records.batches) <= 2


def test_a_full_queue_refuses_requests_until_it_drains(make_engine: MakeEngine, tokens: Prompts) -> None:
    engine = make_engine(max_waiting_tokens=100)
    first = submit(engine, [np.zeros(300, np.int32)])  # a request always fits into an empty queue
    with pytest.raises(Saturated) as refused:
        submit(engine, tokens[:1])
    assert "300" in refused.value.message
    assert "100" in refused.value.message
    assert refused.value.retry_after_s > 0
    engine.start()
    first.result(PATIENCE_S)
    assert ask(engine, tokens[:1]).result.shape == (1, 128)


def test_a_cancelled_request_never_reaches_the_device(make_engine: MakeEngine, tokens: Prompts) -> None:
    records = RecordingListener()
    engine = make_engine(listener=records)
    called: list[Answer | RankletError] = []
    ticket = engine.submit(tokens[:3], None, EmbedParams(), AnswerSink(called.append))
    kept = submit(engine, tokens[3:4])
    ticket.cancel()
    engine.start()
    kept.result(PATIENCE_S)
    until(lambda: bool(records.batches) and records.dropped == 3)
    assert records.batches[0].requests_by_adapter == {"": 1}
    assert called == []
    assert engine.snapshot().waiting_tokens == 0


def test_the_tier_is_where_the_request_found_the_adapter(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts
) -> None:
    records = RecordingListener()
    engine = make_engine(listener=records, slots=1)
    engine.start()
    one, two = (ref(spec.path) for spec in adapter_specs[:2])
    tiers = [ask(engine, tokens[:1], each).tier for each in (one, one, two, one, None)]
    assert tiers == ["disk", "gpu", "disk", "host", None]
    assert records.tiers == ["disk", "gpu", "disk", "host"]
    assert records.gone == [one.name, two.name]
    shot = engine.snapshot()
    assert shot.resident == (one.name,)
    assert set(shot.hosted) == {one.name, two.name}


# Adapters that change, or are no good


def test_a_folder_replaced_under_its_name_is_a_new_revision(
    engine: Engine, model_dir: Path, tmp_path: Path, tokens: Prompts
) -> None:
    def saved(folder: str, seed: int) -> Path:
        return save_adapter(model_dir, tmp_path / folder, r=8, target_modules=["q_proj", "up_proj"], seed=seed)

    folder = saved("live", 1)
    old = ref(folder)
    before = ask(engine, tokens, old).result
    assert_same(before, reference_embedding(model_dir, folder, TEXTS[:8]))
    other = saved("other", 2)
    shutil.copy(other / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    new = ref(folder)
    assert new.revision != old.revision
    after = ask(engine, tokens, new).result
    assert_same(after, reference_embedding(model_dir, other, TEXTS[:8]))
    assert max(cosine(a, b) for a, b in zip(before, after, strict=True)) < 0.999
    assert_same(ask(engine, tokens, old).result, before)  # requests for the old revision still get it


def test_a_bad_folder_fails_its_own_requests_only(
    engine: Engine,
    model_dir: Path,
    tmp_path: Path,
    tokens: Prompts,
    expected: Expected,
    adapter_specs: list[AdapterSpec],
) -> None:
    bad = ref(BROKEN["nan"].make(model_dir, tmp_path / "nan"))
    gone = AdapterRef("gone", str(tmp_path / "gone"), "1")
    good = ref(adapter_specs[0].path)
    with engine.paused():
        futures = {each: submit(engine, tokens, each) for each in (bad, gone, good, None)}
    with pytest.raises(InvalidAdapter, match="NaN"):
        futures[bad].result(PATIENCE_S)
    with pytest.raises(AdapterNotFound):
        futures[gone].result(PATIENCE_S)
    assert_same(futures[good].result(PATIENCE_S).result, expected[good.name])
    assert_same(futures[None].result(PATIENCE_S).result, expected[None])
    with pytest.raises(InvalidAdapter, match="NaN"):  # remembered: refused at once, with the same findings
        submit(engine, tokens, bad)
    with pytest.raises(InvalidAdapter, match="NaN"):
        engine.load(bad)


def test_load_returns_the_adapters_facts(engine: Engine, adapter_specs: list[AdapterSpec], tmp_path: Path) -> None:
    for spec in adapter_specs:
        info = engine.load(ref(spec.path))
        assert (info.name, info.rank, set(info.modules)) == (spec.name, spec.rank, set(spec.targets))
        assert spec.name in engine.snapshot().resident
    with pytest.raises(AdapterNotFound):
        engine.load(AdapterRef("gone", str(tmp_path / "gone"), "1"))


def test_concurrent_loads_share_one_slot(make_engine: MakeEngine, adapter_specs: list[AdapterSpec]) -> None:
    engine = make_engine(slots=1)
    engine.start()
    with ThreadPoolExecutor(12) as threads:
        infos = list(threads.map(engine.load, [ref(spec.path) for spec in adapter_specs * 2]))
    assert [info.name for info in infos] == [spec.name for spec in adapter_specs * 2]


@contextmanager
def slow_disk(path: Path) -> Iterator[None]:
    """Block every open of the file, as a disk that hangs: the kernel waits until this lease is released."""
    before = signal.signal(
        signal.SIGIO, signal.SIG_IGN
    )  # the kernel signals a waiting open; the default action ends the process
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(file)
        signal.signal(signal.SIGIO, before)


def test_a_slow_load_delays_no_other_request(
    make_engine: MakeEngine,
    model_dir: Path,
    tmp_path: Path,
    tokens: Prompts,
    expected: Expected,
    adapter_specs: list[AdapterSpec],
) -> None:
    engine = make_engine(slots=3)
    engine.start()
    resident, fresh, slow = (
        ref(adapter_specs[0].path),
        ref(adapter_specs[1].path),
        ref(sound(model_dir, tmp_path / "slow")),
    )
    engine.load(resident)
    with slow_disk(tmp_path / "slow" / WEIGHTS_FILE):
        stuck = submit(engine, tokens, slow)
        for _ in range(3):
            assert_same(ask(engine, tokens).result, expected[None])
            assert_same(ask(engine, tokens, resident).result, expected[resident.name])
        assert_same(ask(engine, tokens, fresh).result, expected[fresh.name])
        assert not stuck.done()
        assert engine.snapshot().waiting_adapters == ("slow",)
    assert_same(stuck.result(PATIENCE_S).result, reference_embedding(model_dir, tmp_path / "slow", TEXTS[:8]))


# Failures


def test_an_answer_that_is_not_finite_fails_its_own_request_only(
    engine: Engine, model_dir: Path, tmp_path: Path, tokens: Prompts, expected: Expected
) -> None:
    def explode(weights: dict[str, torch.Tensor]) -> None:
        for key in weights:
            weights[key].fill_(1e38)

    huge = ref(edit_weights(sound(model_dir, tmp_path / "huge"), explode))
    engine.load(huge)
    with engine.paused():
        poisoned, good = submit(engine, tokens, huge), submit(engine, tokens)
    with pytest.raises(InternalError, match="not finite"):
        poisoned.result(PATIENCE_S)
    assert_same(good.result(PATIENCE_S).result, expected[None])
    assert engine.healthy()


@contextmanager
def failing_slot(slot: int) -> Iterator[None]:
    """Steps that use a slot raise, as on a device that is out of memory."""
    working = native.linear

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stack: LinearStack, batch: LoraBatch
    ) -> torch.Tensor:
        if any(segment.slot == slot for segment in batch.segments):
            raise RuntimeError("out of luck")
        return working(x, weight, bias, stack, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "linear", linear)
        yield


def test_a_failed_step_fails_only_the_prompt_at_fault(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    engine = make_engine(slots=2)
    engine.start()
    good, bad = (ref(spec.path) for spec in adapter_specs[:2])
    engine.load(good)
    engine.load(bad)
    slot = engine.slot_of(bad)
    assert slot is not None
    with failing_slot(slot):
        with engine.paused():
            wrong = submit(engine, tokens[:1], bad)
            right = [submit(engine, tokens, each) for each in (good, None)]
        with pytest.raises(InternalError, match="out of luck"):
            wrong.result(PATIENCE_S)
        assert_same(right[0].result(PATIENCE_S).result, expected[good.name])
        assert_same(right[1].result(PATIENCE_S).result, expected[None])
        assert engine.healthy()
    assert_same(ask(engine, tokens, bad).result, expected[bad.name])


def test_an_adapter_that_always_fails_leaves_the_engine_healthy(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts, expected: Expected
) -> None:
    engine = make_engine()
    engine.start()
    bad = ref(adapter_specs[0].path)
    engine.load(bad)
    with failing_slot(engine.slot_of(bad) or 0):
        for _ in range(4):
            with pytest.raises(InternalError):
                ask(engine, tokens[:1], bad)
        assert_same(ask(engine, tokens, None).result, expected[None])
        assert engine.healthy()


def test_a_device_that_computes_nothing_makes_the_engine_unhealthy(make_engine: MakeEngine, tokens: Prompts) -> None:
    engine = make_engine()
    engine.start()

    def dead(*_: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    assert engine.healthy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "rms_norm", dead)
        with engine.paused():  # the device is probed although the queue is never empty
            asked = [submit(engine, tokens[:1], None) for _ in range(3)]
        for each in asked:
            with pytest.raises(InternalError, match="device lost"):
                each.result(PATIENCE_S)
        deadline_s = monotonic() + PATIENCE_S
        while engine.healthy() and monotonic() < deadline_s:
            sleep(0.01)
    assert not engine.healthy()


def test_a_callback_that_raises_does_not_affect_other_requests(
    make_engine: MakeEngine, tokens: Prompts, expected: Expected
) -> None:
    engine = make_engine()
    engine.start()

    def careless(_: object) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(tokens[:1], None, EmbedParams(), AnswerSink(careless))
    assert_same(ask(engine, tokens, None).result, expected[None])
    assert engine.healthy()


def test_stopping_twice_is_harmless(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.start()
    engine.stop()
    engine.stop()
    assert not engine.healthy()


@pytest.mark.parametrize(
    ("asked", "dimensions", "says"),
    [
        ([], None, "got none"),
        ([np.zeros(0, np.int32)], None, "got 0"),
        ([np.zeros(40_000, np.int32)], None, "40000"),
        ([np.asarray([1024], np.int32)], None, "1024"),
        ([np.asarray([-1], np.int32)], None, "-1"),
        ([np.zeros(3, np.int32)], 129, "129"),
    ],
)
def test_submit_refuses_bad_requests(engine: Engine, asked: Prompts, dimensions: int | None, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        engine.submit(asked, None, EmbedParams(dimensions), AnswerSink(print))


# The end


def test_stop_refuses_waiting_and_later_requests(
    make_engine: MakeEngine, model_dir: Path, tmp_path: Path, tokens: Prompts
) -> None:
    engine = make_engine()
    engine.start()
    slow = ref(sound(model_dir, tmp_path / "slow"))
    failures: list[BaseException] = []

    def load() -> None:
        try:
            engine.load(slow)
        except RankletError as error:
            failures.append(error)

    with slow_disk(tmp_path / "slow" / WEIGHTS_FILE):
        loading = threading.Thread(target=load)
        loading.start()
        until(lambda: [each.where for each in engine.report()] == ["loading"])
        waiting = submit(engine, tokens, slow)
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        with pytest.raises(Unavailable):
            waiting.result(PATIENCE_S)
        loading.join(PATIENCE_S)
        assert [type(error) for error in failures] == [Unavailable]
        for late in (lambda: submit(engine, tokens), lambda: engine.load(slow)):
            with pytest.raises(Unavailable):
                late()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    assert not engine.healthy()


def test_stop_before_start_and_twice(make_engine: MakeEngine, tokens: Prompts) -> None:
    engine = make_engine()
    waiting = submit(engine, tokens)
    engine.stop()
    with pytest.raises(Unavailable):
        waiting.result(0)
    engine.stop()


def test_every_request_ends_when_an_engine_stops_under_load(make_engine: MakeEngine, tokens: Prompts) -> None:
    engine = make_engine(max_batch_requests=3)
    engine.start()
    futures: list[Future[Answer]] = []
    with pytest.raises(Unavailable):  # noqa: PT012 - raised by the first submit after the stop
        threading.Timer(0.2, engine.stop).start()
        while True:
            futures.append(submit(engine, tokens[:2]))
            sleep(0.001)
    ends = [future.exception(PATIENCE_S) for future in futures]
    assert {type(end) for end in ends} <= {type(None), Unavailable}
    assert ends[0] is None
