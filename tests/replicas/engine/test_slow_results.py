"""Results that the host computes, of Dense layers and heads, do not delay the answers of other requests."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from torch import nn

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError
from ranklet.replicas.model.embedding_settings import read_embedding_settings
from tests.assets.adapters import save_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import HIDDEN, SMALL_MODEL, SentenceFolder
from tests.replicas.asking import PATIENCE_S, ref, submit

PROMPT = [np.arange(5, 9, dtype=np.int32)]
NAMES = ("one", "two")  # of adapters with a Dense layer


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", **SMALL_MODEL)


@pytest.fixture(scope="module", name="folders")
def _folders(base_dir: Path) -> dict[str, Path]:
    made = SentenceFolder(dense=({"out_features": 40, "activation_function": nn.ReLU()},))
    found = {}
    for name in NAMES:
        folder = save_adapter(base_dir, base_dir.parent / name, head="bare", r=4, target_modules=["q_proj"])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base_dir / file, folder)
        found[name] = made.write(folder, HIDDEN)
    return found


@pytest.fixture(name="engine")
def _engine(base_dir: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    running = Engine(EngineConfig(base_dir, slots=2, max_batch_tokens=512))
    running.start()
    for folder in folders.values():
        running.load(ref(folder))
    yield running
    running.stop()


class SlowAnswers:
    """Answers to requests for adapters with a Dense layer. The first one keeps its thread until `released`."""

    def __init__(self, engine: Engine, folders: dict[str, Path]) -> None:
        self.order: list[str] = []
        self.begun, self.released = Event(), Event()
        self._engine = engine
        self._folders = folders

    def ask(self, name: str) -> "Future[Answer]":
        folder, future = self._folders[name], Future[Answer]()
        settings = read_embedding_settings(folder)
        params = EmbedParams(pooling=settings.mode, normalize=settings.normalize, dense=settings.dense)

        def done(result: Answer | RankletError) -> None:
            self.order.append(name)
            self.begun.set()
            self.released.wait()
            assert isinstance(result, Answer)
            future.set_result(result)

        self._engine.submit(PROMPT, ref(folder), params, AnswerSink(done))
        return future


def test_the_answers_of_other_requests_do_not_wait(engine: Engine, folders: dict[str, Path]) -> None:
    answers = SlowAnswers(engine, folders)
    try:
        with engine.paused():
            slow = answers.ask("one")
            plain = submit(engine, PROMPT)
        assert plain.result(PATIENCE_S).result.shape == (1, HIDDEN)
        assert not slow.done()
    finally:
        answers.released.set()
    assert slow.result(PATIENCE_S).result.shape == (1, 40)


def test_adapters_take_turns(engine: Engine, folders: dict[str, Path]) -> None:
    answers = SlowAnswers(engine, folders)
    asked = []
    try:
        for name in ("one", "one", "one", "two"):
            with engine.paused():
                asked.append(answers.ask(name))
                beside = submit(engine, PROMPT)
            beside.result(PATIENCE_S)  # so the step has ended, whose results are computed in the order of the calls
            assert answers.begun.wait(PATIENCE_S)
    finally:
        answers.released.set()
    for each in asked:
        each.result(PATIENCE_S)
    assert answers.order == ["one", "one", "two", "one"]
