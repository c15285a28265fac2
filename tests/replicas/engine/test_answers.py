"""Answers of a running engine equal the reference, for any mix of adapters and lengths."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import AnswerSink
from ranklet.replicas.errors import (
    InvalidRequest,
)
from tests.assets.adapters import AdapterSpec
from tests.assets.corpus import TEXTS
from tests.assets.oracle import reference_embedding
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit, until
from tests.replicas.engine.recording import Expected, MakeEngine, Prompts, RecordingListener


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
    assert records.batches[0].prompts_by_adapter[""] == len(tokens)
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
