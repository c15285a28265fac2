"""Failures of steps, adapters, callbacks and the device, full queues, bad requests, and the stop of an engine."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import torch

from ranklet.kernels import native, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.adapters.reference import WEIGHTS_FILE
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import (
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Saturated,
    Unavailable,
)
from tests.assets.adapters import AdapterSpec
from tests.assets.broken import edit_weights, sound
from tests.assets.hanging import hanging
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit, until
from tests.replicas.engine.recording import Expected, MakeEngine, Prompts, RecordingListener


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


def test_a_key_that_floods_leaves_the_queue_to_others_of_the_same_adapter(
    make_engine: MakeEngine, tokens: Prompts, adapter_specs: list[AdapterSpec]
) -> None:
    records = RecordingListener()
    engine, adapter, prompt = (
        make_engine(listener=records, max_waiting_tokens=1000),
        ref(adapter_specs[0].path),
        tokens[:1],
    )
    flood: list[Future[Answer]] = []
    with pytest.raises(Saturated, match=f"tokens of adapter '{adapter.name}' with key 'flood' wait"):  # noqa: PT012
        while True:
            flood.append(submit(engine, prompt, adapter, key_name="flood"))
    late = submit(engine, prompt, adapter, key_name="late")
    engine.start()
    for each in (late, *flood):
        each.result(PATIENCE_S)
    until(lambda: sum(record.prompts_by_adapter.get(adapter.name, 0) for record in records.batches) == len(flood) + 1)


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
    assert records.batches[0].prompts_by_adapter == {"": 1}
    assert called == []
    assert engine.snapshot().waiting_tokens == 0


def test_an_answer_that_is_not_finite_fails_its_own_request_only(
    engine: Engine, model_dir: Path, tmp_path: Path, tokens: Prompts, expected: Expected
) -> None:
    def explode(weights: dict[str, torch.Tensor]) -> None:
        for key in weights:
            weights[key].fill_(1e6)

    targets = ["gate_proj", "up_proj", "down_proj"]  # each is sound, but their product is not
    huge = ref(edit_weights(sound(model_dir, tmp_path / "huge", target_modules=targets), explode))
    engine.load(huge)
    with engine.paused():
        poisoned, good = submit(engine, tokens, huge), submit(engine, tokens)
    with pytest.raises(InvalidAdapter, match="not finite"):
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

    with hanging(tmp_path / "slow" / WEIGHTS_FILE):
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


@pytest.mark.parametrize("started", [False, True])
def test_an_engine_may_be_stopped_before_its_start_and_twice(
    started: bool, make_engine: MakeEngine, tokens: Prompts
) -> None:
    engine = make_engine()
    waiting = submit(engine, tokens)
    if started:
        engine.start()
        waiting.result(PATIENCE_S)
    engine.stop()
    if not started:
        with pytest.raises(Unavailable):
            waiting.result(0)
    engine.stop()
    assert not engine.healthy()


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
