"""Pieces of texts for gateways: they reach the listeners as bytes, and texts end early when a client needs no more."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import pytest

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.errors import Unavailable
from ranklet.replicas.process.messages import FeedKey, unpack_pieces
from ranklet.replicas.process.process import EngineProcess
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import PATIENCE_S, ref, until
from tests.replicas.streaming import LONG, TextSink, draw


class FedTokens(Listener):
    """Keeps the tokens of each text, by its feed and index, and checks that none is missing or repeated."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int, int], list[int]] = {}
        self.logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.messages: dict[str, int] = {}
        self._lock = Lock()

    def pieces(self, gateway: str, data: bytes) -> None:
        with self._lock:
            self.messages[gateway] = self.messages.get(gateway, 0) + 1
            for number, index, start, tokens, logprobs in unpack_pieces(data):
                known = self.tokens.setdefault((gateway, number, index), [])
                assert start == len(known)
                known += tokens
                self.logprobs += logprobs or ()

    def count(self, gateway: str, number: int, index: int = 0) -> int:
        return len(self.tokens.get((gateway, number, index), ()))


FED = FedTokens()


@pytest.fixture(scope="module")
def process(text_family: tuple[Path, list[AdapterSpec]]) -> Iterator[EngineProcess]:
    config = EngineConfig(text_family[0], slots=2, kv_cache_bytes=8 << 20, max_model_len=512, max_batch_tokens=4096)
    made = EngineProcess(config, FED)
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _nothing_fed() -> None:
    FED.tokens.clear()
    FED.messages.clear()
    FED.logprobs.clear()


def used_pages(engine: EngineProcess) -> int:
    cache = engine.snapshot().kv_cache
    assert cache is not None
    return cache.used_pages


def test_each_gateway_gets_the_pieces_of_its_texts_in_one_message_a_step(
    process: EngineProcess, text_family: tuple[Path, list[AdapterSpec]]
) -> None:
    adapters = [None, ref(text_family[1][0].path)]
    params = GenerateParams(max_tokens=20, temperature=0.8, seed=3, n=2, ignore_eos=True)
    keys = [FeedKey(gateway, number) for gateway in ("g1", "g2", "g3") for number in (7, 8)]
    sinks = {key: TextSink() for key in keys}
    for i, (key, sink) in enumerate(sinks.items()):
        process.submit(draw(9 + i, 40), adapters[i % 2], params, sink, key)
    for key, sink in sinks.items():
        for index, choice in enumerate(sink.generation().choices):
            assert FED.tokens[*key, index] == choice.tokens.tolist()
        assert not sink.tokens, "a sink with a feed gets no pieces"
    assert max(FED.messages.values()) < 3 * 20, "a message has the pieces of all texts of a step"


def test_pieces_carry_logprobs(process: EngineProcess) -> None:
    sink = TextSink()
    params = GenerateParams(max_tokens=4, temperature=0.0, logprobs=2, ignore_eos=True)
    process.submit(draw(9), None, params, sink, FeedKey("g1", 1))
    (choice,) = sink.generation().choices
    assert FED.logprobs == [(each.logprob, each.top) for each in choice.logprobs or ()]
    assert len(FED.logprobs) == 4


def test_pieces_of_a_text_that_goes_on_count_the_tokens_before(process: EngineProcess) -> None:
    params = GenerateParams(max_tokens=12, temperature=0.9, seed=2, n=2, ignore_eos=True, logprobs=0)
    whole, rest = TextSink(), TextSink()
    process.submit(draw(9), None, params, whole, FeedKey("g1", 1))
    choices = whole.generation().choices
    given = [choices[0].tokens[:5], choices[1].tokens[:0]]
    FED.tokens["g1", 2, 0] = given[0].tolist()
    process.submit(draw(9), None, params, rest, FeedKey("g1", 2), given=given)
    for index, (before, after) in enumerate(zip(choices, rest.generation().choices, strict=True)):
        assert FED.tokens["g1", 2, index] == after.tokens.tolist() == before.tokens.tolist()
        assert len(after.logprobs or ()) == 12 - len(given[index])


def test_a_whole_answer_has_no_pieces(process: EngineProcess) -> None:
    sink = TextSink()
    process.submit(draw(9), None, GenerateParams(max_tokens=5, ignore_eos=True), sink)
    assert len(sink.generation().choices[0].tokens) == 5
    assert not FED.messages


def test_a_finished_text_ends_with_what_it_has_while_others_go_on(process: EngineProcess) -> None:
    params = GenerateParams(max_tokens=300, temperature=0.9, seed=1, n=3, ignore_eos=True, logprobs=0)
    sink, key = TextSink(), FeedKey("g1", 5)
    ticket = process.submit(draw(30), None, params, sink, key)
    until(lambda: FED.count("g1", 5, 1) >= 4)
    ticket.finish(1)
    ticket.finish(99)
    sink.ended.result(PATIENCE_S)
    first, second, third = sink.generation().choices
    assert (len(first.tokens), len(third.tokens)) == (300, 300)
    assert (first.finish_reason, second.finish_reason) == ("length", "stop")
    assert second.stop_token is None
    assert 4 < len(second.tokens) < 300
    assert len(second.logprobs or ()) == len(second.tokens)
    for index, choice in enumerate((first, second, third)):
        assert FED.tokens["g1", 5, index] == choice.tokens.tolist()
    until(lambda: used_pages(process) == 0)


def test_a_text_that_waits_for_its_first_step_ends_with_its_first_token(process: EngineProcess) -> None:
    sink = TextSink()
    process.submit(draw(400), None, GenerateParams(max_tokens=90), sink).finish(0)
    (choice,) = sink.generation().choices
    assert (len(choice.tokens), choice.finish_reason) == (1, "stop")


def test_a_cancelled_text_frees_its_pages_and_has_no_further_pieces(process: EngineProcess) -> None:
    sink = TextSink()
    ticket = process.submit(draw(30), None, LONG, sink, FeedKey("g1", 1))
    until(lambda: FED.count("g1", 1) > 3)
    ticket.cancel()
    ticket.finish(0)
    until(lambda: used_pages(process) == 0)
    assert FED.count("g1", 1) < 400
    assert not sink.ended.done()


def test_texts_end_once_when_the_process_dies(text_family: tuple[Path, list[AdapterSpec]]) -> None:
    model, adapters = text_family
    fed, sinks, sink = FedTokens(), [TextSink() for _ in range(6)], TextSink()
    engine = EngineProcess(EngineConfig(model, slots=2, kv_cache_bytes=8 << 20, max_model_len=512), fed)
    engine.start()
    for i, each in enumerate(sinks):
        engine.submit(draw(10 + i), ref(adapters[0].path) if i % 2 else None, LONG, each)
    ticket = engine.submit(draw(20), None, LONG, sink, FeedKey("g1", 1))
    until(lambda: fed.count("g1", 1) > 2 and all(len(each.tokens.get(0, ())) > 2 for each in sinks))
    assert not any(each.ended.done() for each in (*sinks, sink))
    os.kill(engine.pid, signal.SIGKILL)
    for each in (*sinks, sink):
        with pytest.raises(Unavailable, match="has ended"):
            each.ended.result(PATIENCE_S)
    ticket.finish(0)
    assert engine.problem() == "the engine's process has ended"
    late = TextSink()
    engine.submit(draw(9), None, LONG, late).cancel()
    with pytest.raises(Unavailable, match="has ended"):
        late.ended.result(PATIENCE_S)
    engine.stop()
    assert [each.late for each in (*sinks, sink, late)] == [0] * 8
