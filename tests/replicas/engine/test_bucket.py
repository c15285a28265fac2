"""Buckets hold their steps with little padding, and padding changes no vector."""

from collections.abc import Callable, Hashable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ranklet.kernels.batch import LoraBatch, plan
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.bucket import Bucket
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.layout import TokenSpan, whole_prompts
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model.decoder import ignore_stage
from tests.assets.adapters import ATTENTION, LINEAR, save_adapter
from tests.assets.make import make_model
from tests.replicas.asking import ref
from tests.replicas.engine.given import HEAD

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


@given(LENGTHS)
def test_a_bucket_holds_the_step_with_little_padding(lengths: list[int]) -> None:
    bucket, asked = Bucket.of(lengths, 1 << 15), sum(lengths)
    filled = bucket.filled(lengths)
    assert filled[: len(lengths)] == tuple(lengths)
    assert (sum(filled), len(filled)) == (bucket.tokens, bucket.sequences)
    assert max(filled) <= bucket.longest
    assert 0 <= bucket.tokens - asked < max(16, asked / (4 if asked <= 1024 else 8 if asked <= 8192 else 16))
    assert bucket.longest < 2 * max(*lengths, 65), "fillers do not raise the longest length"
    assert len(lengths) <= bucket.sequences <= 4 * (len(lengths) + (bucket.tokens - asked) // bucket.longest + 1)


def test_buckets_are_few_and_are_their_own_buckets() -> None:
    found = {Bucket.of([tokens], 30_720).tokens for tokens in range(1, 16_385)}
    assert len(found) <= 64
    assert all(Bucket.of([tokens], 30_720).tokens == tokens for tokens in found)


def test_nearly_full_steps_share_a_bucket() -> None:
    """A full step of short prompts lacks a few tokens, a different number each time."""
    full = {Bucket.of([tokens - 500, 500], 30_000).tokens for tokens in range(29_500, 30_001)}
    assert full == {30_000}
    assert Bucket.of([29_000], 30_000).tokens != 30_000 != Bucket.of([2_000], 30_000).tokens


def spans_of(runner: Runner, lengths: list[int], slots: list[int | None]) -> tuple[list[TokenSpan], LoraBatch]:
    """Return spans in the order of their LoRA batch, without a backend."""
    order, lora = plan(lengths, slots)
    return whole_prompts([np.zeros(lengths[i], dtype=np.int32) for i in order], HEAD), lora


def test_random_steps_have_few_graph_keys(runner: Runner) -> None:
    """With any lengths and adapters, most steps must find a graph among the 256 that are kept."""
    rng, keys, found, turns = np.random.default_rng(0), set[Hashable](), 0, 4000
    for turn in range(turns):
        lengths = np.clip(rng.lognormal(np.log(100), 0.8, rng.integers(1, 17)), 1, 500).astype(int).tolist()
        slots = [None if rng.random() < 0.1 else int(rng.integers(8)) for _ in lengths]
        spans, lora = spans_of(runner, lengths, slots)
        key = runner.graph_key(
            runner.lay_out(spans, runner.backends.choose(lora, "csgmv"), (HEAD,), padded=True), (HEAD,)
        )
        found += key in keys and turn >= turns // 2
        keys.add(key)
    assert len(keys) <= 200
    assert found >= 0.97 * turns / 2


def test_lengths_that_attention_reads_on_the_host_are_in_the_graph_key(runner: Runner) -> None:
    """Otherwise float32 on a GPU would replay the attention of one step for another."""
    keys = []
    for pads in (True, False):
        runner.pads = pads
        for lengths in ([5, 9], [9, 5]):
            spans, lora = spans_of(runner, lengths, [None] * 2)
            keys.append(runner.graph_key(runner.lay_out(spans, lora, (HEAD,), padded=pads), (HEAD,)))
    assert keys[0] == keys[1]
    assert keys[2] != keys[3]


def test_a_filler_may_be_longer_than_the_models_longest_prompt(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(make_model(tmp_path / "model"), slots=2, max_model_len=24))
    prompts = [np.full(24, i, dtype=np.int32) for i in range(50)]
    plain, padded = plain_and_padded(engine, prompts, [None] * 50, "auto", [1200, 1280])
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
    engine.stop()


BATCHES = ([1], [16], [5, 1, 3], [20, 4, 8], [7] * 9, [70, 40, 1, 3])
CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in product(("last", "mean", "cls"), ("none", "native", "csgmv"), BATCHES)
    if case[1] != "csgmv" or case[0] == "last" or case[2] == [5, 1, 3]  # Triton's interpreter takes seconds for each
]


@pytest.mark.parametrize(("pooling", "backend", "lengths"), CASES)
def test_padding_changes_no_vector(
    pooling: str, backend: str, lengths: list[int], padded_engines: Callable[[str], tuple[Engine, list[int]]]
) -> None:
    engine, slots = padded_engines(pooling)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for length in lengths]
    chosen = [None if backend == "none" else (None, *slots)[(i + 1) % 3] for i in range(len(lengths))]
    rows = [sum(lengths), Bucket.of(lengths, engine.config.max_batch_tokens).tokens]
    plain, padded = plain_and_padded(engine, prompts, chosen, backend, rows)
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_a_step_padded_to_the_largest_size_has_the_same_vectors(
    padded_engines: Callable[[str], tuple[Engine, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest size here is no multiple of sixteen."""
    engine, slots = padded_engines("last")
    monkeypatch.setattr(engine.runner, "max_tokens", 126)
    prompts = [np.full(length, 7 + i, dtype=np.int32) for i, length in enumerate([70, 40, 1, 13])]
    chosen = [slots[0], None, slots[1], slots[0]]
    plain, padded = plain_and_padded(engine, prompts, chosen, "csgmv", [124, 126])
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def plain_and_padded(
    engine: Engine, prompts: list[NDArray[np.int32]], slots: list[int | None], backend: str, rows: list[int]
) -> list[torch.Tensor]:
    """Compute a step as it is and padded, with these numbers of tokens."""
    runner, heads = engine.runner, (engine.heads.base,)
    order, lora = plan([len(prompt) for prompt in prompts], slots)
    lora = runner.backends.choose(lora, backend)
    spans, vectors = whole_prompts([prompts[i] for i in order], engine.heads.base), []
    for padded, expected in zip((False, True), rows, strict=True):
        layout = runner.lay_out(spans, lora, heads, padded=padded)
        assert layout.lora.rows == expected
        with torch.inference_mode():
            (output,) = runner.forward(layout, heads, ignore_stage, layout.buffer)
        vectors.append(output[: len(prompts)])
    return vectors


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """A runner that pads steps as on a GPU."""
    engine = Engine(EngineConfig(make_model(tmp_path / "model"), slots=8, padded_steps=True))
    yield engine.runner
    engine.stop()


@pytest.fixture(scope="module")
def padded_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Engine, list[int]]]:
    """An engine by pooling, two adapters in its slots; its threads do not run."""
    folder = tmp_path_factory.mktemp("padded")
    made: dict[str, tuple[Engine, list[int]]] = {}
    adapters: list[Path] = []

    def engine(pooling: str) -> tuple[Engine, list[int]]:
        if pooling not in made:
            said: dict[str, Any] = {"pooling": pooling}
            model = make_model(folder / pooling, layers=2, hidden_size=64, intermediate_size=96, **said)
            if not adapters:
                adapters.extend(
                    save_adapter(model, folder / f"r{rank}", r=rank, target_modules=list(targets))
                    for rank, targets in ((64, ATTENTION), (16, LINEAR))
                )
            made[pooling] = _engine(model, adapters)
        return made[pooling]

    return engine


def _engine(model: Path, adapters: list[Path]) -> tuple[Engine, list[int]]:
    engine = Engine(EngineConfig(model, slots=2, base_aliases=("*",)))
    engine.start()
    slots = []
    for path in adapters:
        engine.load(ref(path))
        slot = engine.slot_of(ref(path))
        assert slot is not None
        slots.append(slot)
    engine.stop()
    return engine, slots
