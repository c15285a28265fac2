"""Text from an engine in a process of its own: the same pieces and texts, and an end for every stream."""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from ranklet.replicas.adapters.reference import WEIGHTS_FILE
from ranklet.replicas.cache.pages import PagePool
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import AdapterLoadCrashed, InvalidRequest, RankletError, Unavailable
from ranklet.replicas.model.sampled import TokenLogprob
from ranklet.replicas.process.messages import (
    EngineState,
    FeedPieces,
    MethodCall,
    Outbox,
    StepPieces,
    pack_pieces,
    piece_tuple,
    token_piece,
    unpack_pieces,
)
from ranklet.replicas.process.process import EngineProcess
from ranklet.replicas.process.worker import Worker
from tests.assets.adapters import AdapterSpec
from tests.assets.hanging import hanging
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit, until
from tests.replicas.streaming import LONG, TextSink, draw


@pytest.fixture(scope="session")
def model_dir(text_family: tuple[Path, list[AdapterSpec]]) -> Path:
    return text_family[0]


@pytest.fixture(scope="session")
def adapter_specs(text_family: tuple[Path, list[AdapterSpec]]) -> list[AdapterSpec]:
    return text_family[1]


def text_config(model_dir: Path) -> EngineConfig:
    return EngineConfig(model_dir, slots=2, kv_cache_bytes=8 << 20, max_model_len=512, max_batch_tokens=4096)


@pytest.fixture(scope="module")
def text_process(model_dir: Path) -> Iterator[EngineProcess]:
    made = EngineProcess(text_config(model_dir))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def text_here(model_dir: Path) -> Iterator[Engine]:
    made = Engine(text_config(model_dir))
    made.start()
    yield made
    made.stop()


def is_idle(engine: EngineProcess) -> bool:
    shot = engine.snapshot()
    return shot.waiting_requests == shot.running_requests == 0


@pytest.mark.parametrize(
    "params",
    [
        GenerateParams(max_tokens=9, temperature=0.0, ignore_eos=True),
        GenerateParams(max_tokens=9, temperature=0.9, seed=5, n=2, ignore_eos=True),
        GenerateParams(max_tokens=9, temperature=0.0, logprobs=3, logit_bias=((7, 2.0),), ignore_eos=True),
    ],
)
def test_texts_equal_those_of_an_engine_in_this_process(
    text_process: EngineProcess, text_here: Engine, adapter_specs: list[AdapterSpec], params: GenerateParams
) -> None:
    prompts = draw(9, 70)
    for adapter in (None, ref(adapter_specs[0].path), ref(adapter_specs[1].path)):
        theirs, ours = TextSink(), TextSink()
        for engine, sink in ((text_here, theirs), (text_process, ours)):
            engine.submit(prompts, adapter, params, sink)
        wanted, found = theirs.generation(), ours.generation()
        assert ours.tokens == theirs.tokens
        assert [each.tokens.tolist() for each in found.choices] == list(dict(sorted(ours.tokens.items())).values())
        for index, (one, other) in enumerate(zip(wanted.choices, found.choices, strict=True)):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            assert (one.finish_reason, one.stop_token) == (other.finish_reason, other.stop_token)
            assert (one.logprobs is None) == (other.logprobs is None) == (params.logprobs is None)
            assert list(other.logprobs or ()) == ours.logprobs[index]
            for one_token, other_token in zip(one.logprobs or (), other.logprobs or (), strict=True):
                assert abs(one_token.logprob - other_token.logprob) <= 1e-4
                assert [token for token, _ in one_token.top] == [token for token, _ in other_token.top]


def test_many_streams_run_beside_embeddings(
    text_process: EngineProcess, text_here: Engine, adapter_specs: list[AdapterSpec]
) -> None:
    adapters = [None, *(ref(spec.path) for spec in adapter_specs[:2])]
    params = GenerateParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    ours, theirs = ([TextSink() for _ in range(9)] for _ in range(2))
    for engine, sinks in ((text_process, ours), (text_here, theirs)):
        for i, sink in enumerate(sinks):
            engine.submit(draw(20 + i), adapters[i % 3], params, sink)
    for adapter in adapters:
        vectors = [
            submit(engine, draw(30, 6), adapter).result(PATIENCE_S).result for engine in (text_process, text_here)
        ]
        assert_same(*vectors)
    for one, other in zip(ours, theirs, strict=True):
        assert one.generation().choices[0].tokens.tolist() == one.tokens[0]
        assert one.tokens[0] == other.generation().choices[0].tokens.tolist()


def test_a_caller_of_the_whole_text_gets_it_without_pieces(text_process: EngineProcess) -> None:
    results: list[Answer | RankletError] = []
    params = GenerateParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    sink = TextSink()
    text_process.submit(draw(9), None, params, AnswerSink(results.append))
    text_process.submit(draw(9), None, params, sink)
    wanted = sink.generation().choices[0].tokens.tolist()
    until(lambda: bool(results))
    (found,) = results
    assert isinstance(found, Answer)
    assert found.result.choices[0].tokens.tolist() == wanted


def test_a_refused_text_ends_with_the_error(text_process: EngineProcess) -> None:
    sink = TextSink()
    text_process.submit(draw(20), None, GenerateParams(max_tokens=493), sink)
    with pytest.raises(InvalidRequest, match="expected at most 492") as refused:
        sink.ended.result(PATIENCE_S)
    assert refused.value.param == "max_tokens"
    assert not sink.tokens


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_stream_ends_without_a_result(
    text_process: EngineProcess, adapter_specs: list[AdapterSpec], after: int
) -> None:
    sink, beside = TextSink(), TextSink()
    ticket = text_process.submit(draw(100), ref(adapter_specs[0].path), LONG, sink)
    until(lambda: len(sink.tokens.get(0, ())) >= after)
    ticket.cancel()
    assert text_process.open_calls == 0
    until(lambda: is_idle(text_process))
    assert not sink.ended.done()
    assert len(sink.tokens.get(0, ())) < 400
    cache = text_process.snapshot().kv_cache
    assert cache is not None
    assert (cache.sequences, cache.used_pages) == (0, 0)
    assert all(report.references == 0 for report in text_process.report())
    text_process.submit(draw(100), None, GenerateParams(max_tokens=3), beside)
    assert len(beside.generation().choices) == 1


def test_a_process_that_dies_while_it_loads_an_adapter_blames_the_adapter(
    model_dir: Path, adapter_specs: list[AdapterSpec], tmp_path: Path
) -> None:
    """The error of its calls differs from that of others, so that no other replica is tried with the adapter."""
    folder = tmp_path / "suspect"
    shutil.copytree(adapter_specs[0].path, folder)
    suspect, engine = ref(folder), EngineProcess(text_config(model_dir))
    engine.start()
    submit(engine, draw(9)).result(PATIENCE_S)
    until(engine.healthy)
    running, writing = TextSink(), TextSink()
    with hanging(folder / WEIGHTS_FILE):
        engine.submit(draw(20), None, LONG, running)
        engine.submit(draw(20), suspect, LONG, writing)
        waiting, loading = submit(engine, draw(9), suspect), ThreadPoolExecutor(1).submit(engine.load, suspect)
        until(lambda: engine.held().loading == ("suspect",) and engine.open_calls == 4 and bool(running.tokens))
        os.kill(engine.pid, signal.SIGSTOP)
        beside = submit(engine, draw(9))
        os.kill(engine.pid, signal.SIGKILL)
        for blamed in (writing.ended, waiting, loading):
            with pytest.raises(AdapterLoadCrashed, match="suspect"):
                blamed.result(PATIENCE_S)
        for other in (running.ended, beside):
            with pytest.raises(Unavailable, match="has ended"):
                other.result(PATIENCE_S)
    assert not engine.healthy()
    with pytest.raises(Unavailable):
        submit(engine, draw(9)).result(PATIENCE_S)
    engine.stop()


def test_stopping_ends_streams(model_dir: Path) -> None:
    engine, sink = EngineProcess(text_config(model_dir)), TextSink()
    engine.start()
    engine.submit(draw(20), None, LONG, sink)
    until(lambda: bool(sink.tokens))
    engine.stop()
    with pytest.raises(Unavailable, match="shutting down"):
        sink.ended.result(0)
    assert not sink.late
    assert engine.problem() == "the engine's process has ended", "a call after the stop is not sent"


def test_a_lost_page_is_reported_to_the_parent(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker runs in a thread of the test, which makes its engine lose pages."""
    ours, theirs = Pipe()
    worker = Worker(theirs)
    serving = Thread(target=worker.serve)
    serving.start()
    monkeypatch.setattr(PagePool, "release", lambda self, pages: None)
    params = GenerateParams(max_tokens=2, ignore_eos=True)
    calls = [("make", (text_config(model_dir),)), ("start", ()), ("submit", (draw(9), None, params, [], None, ""))]
    ours.send([MethodCall(number, method, arguments) for number, (method, arguments) in enumerate(calls)])
    problems: list[str | None] = []
    while not problems or problems[-1] is None:
        assert ours.poll(PATIENCE_S)
        problems += [message.problem for message in ours.recv() if isinstance(message, EngineState)]
    assert problems[0] is None
    assert "1 references, but 0 sequences hold it" in (problems[-1] or "")
    ours.send([MethodCall(3, "stop")])
    serving.join(PATIENCE_S)
    assert not serving.is_alive()


@pytest.mark.parametrize("logprobs", [None, (TokenLogprob(-0.5),), (TokenLogprob(-0.5, ((3, -0.5), (9, -1.5))),)])
def test_a_piece_survives_its_message(logprobs: tuple[TokenLogprob, ...] | None) -> None:
    piece = (17,), logprobs
    number, index, start, *_ = message = piece_tuple(3, 1, 5, piece)
    assert (number, index, start) == (3, 1, 5)
    assert all(type(each) is tuple for each in message[4] or ()), "a class of its own makes pickling slow"
    assert [token_piece(each) for each in unpack_pieces(pack_pieces([message]))] == [piece]


def test_pieces_of_a_step_are_sent_at_once_in_one_message_a_gateway() -> None:
    ours, theirs = Pipe()
    outbox = Outbox(ours)
    step = StepPieces(outbox)
    pieces = [piece_tuple(number, 0, 0, ((number,), None)) for number in range(256)]
    for piece in pieces:
        step.add(("even", "odd")[piece[0] % 2], piece)
    step.flush()
    assert not theirs.poll(0.05)
    outbox.put("step")
    step.flush()
    first, second, last = theirs.recv()
    assert (first, second) == (
        FeedPieces("even", pack_pieces(pieces[::2])),
        FeedPieces("odd", pack_pieces(pieces[1::2])),
    )
    assert last == "step"
    outbox.put_later("last")
    outbox.close()
    assert theirs.recv() == ["last"]
