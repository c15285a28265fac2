"""A second task on the engine's seams: two passes over each sequence, with pieces that leave between them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.tasks import Delta, Done
from ranklet.replicas.errors import InternalError, RankletError, Unavailable
from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.heads import Head
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit, until
from tests.replicas.engine.recording import RecordingListener


class HalvesTask:
    """Pools the first half of each sequence, then its second half: the second pass starts in the middle.

    Attention is relative to positions, so each half has the vector that an embedding of that half alone has.
    """

    def __init__(self, prompts: int, head: Head, *, between: Callable[[], None] = lambda: None) -> None:
        self._head = head
        self._between = between
        self._halves: list[list[NDArray[np.float32]]] = [[] for _ in range(prompts)]

    def need(self, sequence: Sequence) -> Need:
        middle = len(sequence.ids) // 2
        if sequence.computed:
            return Need(len(sequence.ids) - middle, self._head, is_final=True)
        return Need(middle, self._head)

    def accept(self, sequence: Sequence, output: NDArray[Any]) -> Delta | Done:
        self._halves[sequence.index].append(output.copy())
        if sequence.computed:
            return Done()
        self._between()
        return Delta(output.copy())

    def result(self) -> NDArray[np.float32]:
        return np.asarray(self._halves)


class NormHead:
    """The length of each sequence's last state: a second head, so that steps of two tasks have two heads."""

    reads_last = True

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        return states[spans.offsets[1:] - 1]

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return norms

    def are_valid(self, outputs: NDArray[Any]) -> NDArray[np.bool_]:
        valid: NDArray[np.bool_] = outputs[:, 0] > 0
        return valid


@dataclass
class RecordingSink:
    pieces: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    ended: "Future[Answer]" = field(default_factory=Future)

    def delta(self, index: int, piece: Any) -> None:
        assert not self.ended.done(), "no piece comes after the end"
        self.pieces.append((index, piece))

    def done(self, result: Answer | RankletError) -> None:
        if isinstance(result, RankletError):
            self.ended.set_exception(result)
        else:
            self.ended.set_result(result)


def draw(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 1024, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_each_half_has_the_vector_of_that_half_alone(
    engine: Engine, adapter_specs: list[AdapterSpec], with_adapter: bool
) -> None:
    adapter: AdapterRef | None = ref(adapter_specs[0].path) if with_adapter else None
    prompts, sink = draw(9, 40, 2), RecordingSink()
    engine.submit_task(prompts, adapter, HalvesTask(3, engine.head), sink)
    answer = sink.ended.result(PATIENCE_S)
    halves = [part for ids in prompts for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
    alone = ask(engine, halves, adapter).result.reshape(3, 2, -1)
    for ours, theirs in zip(answer.result, alone, strict=True):
        assert_same(ours, theirs)
    assert sorted(index for index, _ in sink.pieces) == [0, 1, 2]
    for index, piece in sink.pieces:
        assert_same(piece[None], alone[index, :1])
    assert answer.prompt_tokens == sum(map(len, prompts))


def test_only_first_passes_count_as_waits_in_the_queue(make_engine: Callable[..., Engine]) -> None:
    listener, prompts, sink = RecordingListener(), draw(9, 40, 2), RecordingSink()
    engine = make_engine(listener=listener)
    engine.start()
    engine.submit_task(prompts, None, HalvesTask(3, engine.head), sink)
    sink.ended.result(PATIENCE_S)
    until(lambda: sum(record.tokens for record in listener.batches) == sum(map(len, prompts)))
    assert sum(record.prompts_by_adapter[""] for record in listener.batches) == 2 * len(prompts)
    assert sum(len(record.queue_waits_s) for record in listener.batches) == len(prompts)


def test_two_tasks_share_steps(engine: Engine) -> None:
    """Embeddings beside the second task get the vectors that they get alone."""
    prompts, sink = draw(30, 6), RecordingSink()
    alone = ask(engine, prompts).result
    with engine.paused():
        beside = [submit(engine, [ids]) for ids in prompts]
        engine.submit_task(prompts, None, HalvesTask(2, NormHead()), sink)
        more = submit(engine, prompts)
    for i, future in enumerate(beside):
        assert_same(future.result(PATIENCE_S).result, alone[i : i + 1])
    assert_same(more.result(PATIENCE_S).result, alone)
    norms = sink.ended.result(PATIENCE_S).result
    assert norms.shape == (2, 2, 1)
    assert (norms > 0).all()


def test_a_sequence_keeps_its_slot_between_passes(
    make_engine: Callable[..., Engine], adapter_specs: list[AdapterSpec]
) -> None:
    """Another adapter waits for the only slot, and gets it only after the second pass."""
    engine = make_engine(slots=1)
    engine.start()
    ours, theirs = (ref(spec.path) for spec in adapter_specs[:2])
    others: list[Future[Answer]] = []
    sink = RecordingSink()
    task = HalvesTask(1, engine.head, between=lambda: others.append(submit(engine, draw(5), theirs)))
    engine.submit_task(draw(20), ours, task, sink)
    first, second = draw(20)[0][:10], draw(20)[0][10:]
    answer = sink.ended.result(PATIENCE_S)
    others[0].result(PATIENCE_S)
    assert_same(answer.result[0], ask(engine, [first, second], ours).result)
    assert [report.references for report in engine.report()] == [0, 0], "no slot stays in use"


def test_a_request_cancelled_between_passes_frees_its_slot(
    make_engine: Callable[..., Engine], adapter_specs: list[AdapterSpec]
) -> None:
    engine = make_engine(slots=1)
    engine.start()
    ours, theirs = (ref(spec.path) for spec in adapter_specs[:2])
    sink = RecordingSink()
    task = HalvesTask(1, engine.head, between=lambda: ticket.cancel())
    with engine.paused():
        ticket = engine.submit_task(draw(20), ours, task, sink)
    ask(engine, draw(5), theirs)
    assert not sink.ended.done()
    assert engine.snapshot().waiting_requests == 0


def test_stopping_refuses_a_request_between_passes(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.start()
    sink, stopping = RecordingSink(), Thread(target=engine.stop)

    def stop() -> None:
        stopping.start()
        until(lambda: not engine.healthy())  # the step thread has ended; this is the answer thread

    engine.submit_task(draw(20), None, HalvesTask(1, engine.head, between=stop), sink)
    with pytest.raises(Unavailable):
        sink.ended.result(PATIENCE_S)
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


def test_a_task_that_raises_fails_its_own_request_only(engine: Engine) -> None:
    def fail() -> None:
        raise ValueError("a defect of the task")

    sink = RecordingSink()
    with engine.paused():
        engine.submit_task(draw(20), None, HalvesTask(1, engine.head, between=fail), sink)
        beside = submit(engine, draw(5))
    with pytest.raises(InternalError, match="a defect of the task"):
        sink.ended.result(PATIENCE_S)
    assert beside.result(PATIENCE_S).result.shape == (1, 128)
    assert engine.healthy()


class EndlessTask(HalvesTask):
    """Calls its first pass final, and then wants another one."""

    def need(self, sequence: Sequence) -> Need:
        return super().need(sequence)._replace(is_final=True)


def test_a_task_that_goes_on_after_a_final_pass_fails_its_own_request_only(
    engine: Engine, adapter_specs: list[AdapterSpec]
) -> None:
    adapter, sink = ref(adapter_specs[0].path), RecordingSink()
    engine.submit_task(draw(20), adapter, EndlessTask(1, engine.head), sink)
    with pytest.raises(InternalError, match="final"):
        sink.ended.result(PATIENCE_S)
    assert ask(engine, draw(5), adapter).result.shape == (1, 128)
    assert engine.healthy()
