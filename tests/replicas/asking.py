"""Sends requests to an engine and compares its answers with the oracle's."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import read_invocation, revision_of
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.layout import whole_prompts
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError
from ranklet.replicas.model.decoder import StageCallback
from ranklet.replicas.process.process import EngineProcess
from tests.assets.oracle import cosine, encode

PATIENCE_S = 60.0  # limit of a test's wait for an answer


def ref(folder: Path, name: str | None = None) -> AdapterRef:
    """Return the current revision of the adapter in a folder."""
    return AdapterRef(name or folder.name, str(folder), revision_of(folder), invocation=read_invocation(folder))


def prompts(model_dir: Path, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    return [np.asarray(encode(model_dir, text), dtype=np.int32) for text in texts]


def submit(
    engine: Engine | EngineProcess, asked: Sequence[NDArray[np.int32]], adapter: AdapterRef | None = None,
    dimensions: int | None = None, *, key_name: str = "", **params: Any,
) -> Future[Answer]:  # fmt: skip
    """Queue a request, with fields of `EmbedParams`. A second call of `done` raises and fails the test."""
    future: Future[Answer] = Future()

    def done(result: Answer | RankletError) -> None:
        if isinstance(result, RankletError):
            future.set_exception(result)
        else:
            future.set_result(result)

    engine.submit(asked, adapter, EmbedParams(dimensions, **params), AnswerSink(done), key_name=key_name)
    return future


def ask(
    engine: Engine, asked: Sequence[NDArray[np.int32]], adapter: AdapterRef | None = None,
    dimensions: int | None = None, **params: Any,
) -> Answer:  # fmt: skip
    return submit(engine, asked, adapter, dimensions, **params).result(PATIENCE_S)


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Check the promised float32 accuracy: cosine of at least 0.999999, entries within 1e-5."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert cosine(our, their) >= 0.999999, f"row {index}"
        assert np.abs(our - their).max() <= 1e-5, f"row {index}"


def launch(
    engine: Engine,
    asked: Sequence[NDArray[np.int32]],
    slots: Sequence[int | None],
    on_stage: StageCallback | None = None,
) -> LaunchedStep:
    """Launch whole prompts in one step, past the queue."""
    return engine.runner.launch(whole_prompts(asked, engine.heads.base), slots, on_stage)


def vectors_of(step: LaunchedStep) -> NDArray[np.float32]:
    """Wait for a step of one head. Returns its outputs in the order of the prompts."""
    step.wait()
    (group,) = step.groups
    results = dict(group.results())
    return np.asarray([results[i] for i in range(len(results))])


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, polling."""
    end_s = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < end_s, "the condition did not become true in time"
        sleep(0.002)
