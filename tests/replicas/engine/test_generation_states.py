"""Random requests on a running engine with few pages: each answer is the reference's, and everything is freed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.tensors import page_bytes
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation, TokenPiece
from ranklet.replicas.engine.params import EmbedParams, GenerateParams
from ranklet.replicas.engine.request import Answer, Ticket
from ranklet.replicas.errors import RankletError
from ranklet.replicas.model.architecture import Architecture
from tests.assets.adapters import AdapterSpec
from tests.assets.text_oracle import reference_text
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, until
from tests.replicas.engine.recording import MakeEngine

MOST = 32  # tokens of a text
NAMES = ("one", "two", "three")
FOLDERS = 3


def asked_prompts() -> list[NDArray[np.int32]]:
    """Return prompts whose texts soon need another page; two share their first page."""
    long, other = np.random.default_rng(5).integers(3, 1024, (2, 130), dtype=np.int32)
    return [long[:124], np.concatenate([long[:64], other[:60]]), long[:55], other[:60]]


PROMPTS = asked_prompts()


@dataclass(eq=False)
class RandomRequest:
    """A request to the engine, and what has come back."""

    prompt: int
    folder: Path | None
    params: GenerateParams | EmbedParams
    ticket: Ticket = field(init=False)
    cancelled: bool = False
    tokens: dict[int, list[int]] = field(default_factory=dict)
    results: list[Answer | RankletError] = field(default_factory=list)
    news: Event = field(default_factory=Event)

    def begun(self, index: int, cached_tokens: int) -> None:
        assert index not in self.tokens

    def delta(self, index: int, piece: TokenPiece) -> None:
        self.tokens.setdefault(index, []).extend(piece[0])
        self.news.set()

    def done(self, result: Answer | RankletError) -> None:
        self.results.append(result)
        self.news.set()


@dataclass
class Expectation:
    """Reference texts and vectors, by folder and prompt."""

    texts: dict[Path | None, list[list[int]]]
    vectors: dict[Path | None, list[NDArray[np.float32]]]

    def check(self, request: RandomRequest) -> None:
        (result,) = request.results
        assert isinstance(result, Answer), result
        if isinstance(request.params, EmbedParams):
            assert_same(result.result, self.vectors[request.folder][request.prompt])
            return
        assert isinstance(result.result, Generation)
        assert len(result.result.choices) == request.params.n
        for index, choice in enumerate(result.result.choices):
            expected = self.texts[request.folder][request.prompt][: request.params.max_tokens]
            assert choice.tokens.tolist() == request.tokens[index] == expected


class GenerationStates(RuleBasedStateMachine):
    def __init__(self, engine: Engine, folders: list[Path], expectation: Expectation) -> None:
        super().__init__()
        self.engine = engine
        self.folders = folders
        self.expectation = expectation
        self.current = dict(zip(NAMES, folders, strict=True))
        self.sent: list[RandomRequest] = []

    def adapter(self, name: str | None) -> AdapterRef | None:
        return None if name is None else ref(self.current[name], name)

    def submit(self, prompt: int, name: str | None, params: GenerateParams | EmbedParams) -> None:
        request = RandomRequest(prompt, None if name is None else self.current[name], params)
        request.ticket = self.engine.submit([PROMPTS[prompt]], self.adapter(name), params, request)
        self.sent.append(request)

    def open(self) -> list[RandomRequest]:
        return [each for each in self.sent if not each.results and not each.cancelled]

    @rule(
        prompt=st.integers(0, 3), name=st.none() | st.sampled_from(NAMES), most=st.sampled_from((1, 2, 20, MOST)),
        n=st.sampled_from((1, 1, 2)),
    )  # fmt: skip
    def generate(self, prompt: int, name: str | None, most: int, n: int) -> None:
        self.submit(prompt, name, GenerateParams(max_tokens=most, temperature=0.0, ignore_eos=True, n=n))

    @rule(asked=st.lists(st.tuples(st.integers(0, 3), st.none() | st.sampled_from(NAMES)), min_size=2, max_size=5))
    def generate_together(self, asked: list[tuple[int, str | None]]) -> None:
        with self.engine.paused():
            for prompt, name in asked:
                self.generate(prompt, name, MOST, 1)

    @rule(prompt=st.integers(0, 3), name=st.none() | st.sampled_from(NAMES))
    def embed(self, prompt: int, name: str | None) -> None:
        self.submit(prompt, name, EmbedParams())

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def wait_for_news(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(range(len(self.open()))).map(self.open().__getitem__))
        request.news.clear()
        assert request.results or request.news.wait(PATIENCE_S)

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(range(len(self.open()))).map(self.open().__getitem__))
        request.ticket.cancel()
        request.cancelled = True

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        adapter = self.adapter(name)
        assert adapter is not None
        self.engine.prefetch(adapter)

    @rule(name=st.sampled_from(NAMES), folder=st.integers(0, FOLDERS - 1))
    def replace(self, name: str, folder: int) -> None:
        """Requests that were submitted before end with the old revision."""
        self.current[name] = self.folders[folder]
        adapter = self.adapter(name)
        assert adapter is not None
        self.engine.release(name, keep=adapter.revision)

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.engine.release(name)

    @invariant()
    def agrees(self) -> None:
        self.engine.check_integrity()
        assert self.engine.healthy()

    def teardown(self) -> None:
        until(lambda: not self.open())
        until(lambda: self.engine.snapshot().waiting_requests + self.engine.snapshot().running_requests == 0)
        for request in self.sent:
            if request.results or not request.cancelled:
                self.expectation.check(request)
        for name in NAMES:  # no reference to a slot is left
            until(lambda name=name: self.engine.release(name))  # type: ignore[misc]
        self.agrees()


@pytest.fixture
def tight_engine(make_engine: MakeEngine, architecture: Architecture) -> Iterator[Engine]:
    """Return an engine with space for four requests, of which few keep their pages."""
    engine = make_engine(
        slots=2, max_model_len=192, max_batch_tokens=192, max_batch_requests=4, decode_slowdown=1.0,
        kv_cache_bytes=5 * page_bytes(architecture, torch.float32),
    )  # fmt: skip
    engine.start()
    yield engine
    engine.check_integrity()


def test_random_requests_get_the_reference_answers(
    tight_engine: Engine, model_dir: Path, adapter_specs: list[AdapterSpec]
) -> None:
    folders = [spec.path for spec in adapter_specs[:FOLDERS]]
    expectation = Expectation(
        {
            folder: [text.tokens.tolist() for text in reference_text(model_dir, folder, PROMPTS, MOST)]
            for folder in (None, *folders)
        },
        {
            folder: [ask(tight_engine, [prompt], None if folder is None else ref(folder)).result for prompt in PROMPTS]
            for folder in (None, *folders)
        },
    )
    run_state_machine_as_test(
        cast(Any, lambda: GenerationStates(tight_engine, folders, expectation)),
        settings=settings(
            max_examples=9, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
