"""Batches rounded up: what a bucket holds, and that padding changes no vector."""

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

from ranklet.kernels.batch import plan
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.bucket import Bucket
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.runner import Runner
from tests.assets.make import AdapterSpec, make_model
from tests.replicas.asking import ref

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


@given(LENGTHS)
def test_a_bucket_holds_the_batch_and_little_more(lengths: list[int]) -> None:
    bucket, asked = Bucket.of(lengths, 1 << 15), sum(lengths)
    filled = bucket.filled(lengths)
    assert filled[: len(lengths)] == tuple(lengths)
    assert (sum(filled), len(filled)) == (bucket.tokens, bucket.prompts)
    assert max(filled) <= bucket.longest
    assert 0 <= bucket.tokens - asked < max(16, asked / (4 if asked <= 1024 else 8 if asked <= 8192 else 16))
    assert bucket.longest < 2 * max(*lengths, 65), "what fills the batch makes no prompt longer"
    assert len(lengths) <= bucket.prompts <= 4 * (len(lengths) + (bucket.tokens - asked) // bucket.longest + 1)


def test_buckets_are_few_and_fixed_points() -> None:
    found = {Bucket.of([tokens], 30_720).tokens for tokens in range(1, 16_385)}
    assert len(found) <= 64
    assert all(Bucket.of([tokens], 30_720).tokens == tokens for tokens in found)


def test_batches_that_are_as_good_as_full_share_a_bucket() -> None:
    """A full batch of short prompts has a few tokens less than it may, never the same number."""
    full = {Bucket.of([tokens - 500, 500], 30_000).tokens for tokens in range(29_500, 30_001)}
    assert full == {30_000}
    assert Bucket.of([29_000], 30_000).tokens != 30_000 != Bucket.of([2_000], 30_000).tokens


def test_random_batches_come_in_few_shapes(stepper: Runner) -> None:
    """Any lengths, any adapters: most batches must meet a graph that is there, of the 256 that are kept."""
    rng, shapes, met, turns = np.random.default_rng(0), set[Hashable](), 0, 4000
    for turn in range(turns):
        lengths = np.clip(rng.lognormal(np.log(100), 0.8, rng.integers(1, 17)), 1, 500).astype(int).tolist()
        order, lora = plan(lengths, [None if rng.random() < 0.1 else int(rng.integers(8)) for _ in lengths])
        lora = stepper.backends.choose(lora, "csgmv")
        layout = stepper._lay_out([np.zeros(lengths[i], dtype=np.int32) for i in order], lora, padded=True)
        shape = stepper._shape(layout)
        met += shape in shapes and turn >= turns // 2
        shapes.add(shape)
    assert len(shapes) <= 200
    assert met >= 0.97 * turns / 2


def test_lengths_that_attention_reads_on_the_host_are_in_the_shape(stepper: Runner) -> None:
    """Otherwise float32 on a GPU would replay one batch's attention on another."""
    shapes = []
    for rounds in (True, False):
        stepper._rounds = rounds
        for lengths in ((5, 9), (9, 5)):
            lora = plan(lengths, [None] * 2)[1]
            prompts = [np.zeros(length, dtype=np.int32) for length in lengths]
            shapes.append(stepper._shape(stepper._lay_out(prompts, lora, padded=rounds)))
    assert shapes[0] == shapes[1]
    assert shapes[2] != shapes[3]


def test_what_fills_a_batch_may_be_longer_than_the_model_takes(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(make_model(tmp_path / "model"), slots=2, max_model_len=24))
    lengths, stepper = [24] * 50, engine.stepper
    prompts = [np.full(length, i, dtype=np.int32) for i, length in enumerate(lengths)]
    lora = plan(lengths, [None] * len(lengths))[1]
    layout = stepper._lay_out(prompts, lora, padded=True)
    assert max(layout.lengths) > 24
    with torch.inference_mode():
        vectors = stepper._forward(layout, layout.buffer)[: len(lengths)]
        alone = stepper._lay_out(prompts, lora)
        torch.testing.assert_close(vectors, stepper._forward(alone, alone.buffer), rtol=1e-5, atol=1e-5)
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
    plain, padded = plain_and_padded(engine.stepper, prompts, chosen, backend, rows)
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_filled_up_has_the_same_vectors(
    padded_engines: Callable[[str], tuple[Engine, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the most is; here no multiple of sixteen."""
    engine, slots = padded_engines("last")
    monkeypatch.setattr(engine.stepper, "_max_tokens", 126)
    prompts = [np.full(length, 7 + i, dtype=np.int32) for i, length in enumerate([70, 40, 1, 13])]
    chosen = [slots[0], None, slots[1], slots[0]]
    plain, padded = plain_and_padded(engine.stepper, prompts, chosen, "csgmv", [124, 126])
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def plain_and_padded(
    stepper: Runner, prompts: list[NDArray[np.int32]], slots: list[int | None], backend: str, rows: list[int]
) -> list[torch.Tensor]:
    """The vectors of a batch as it is and rounded up, which has so many tokens each."""
    order, lora = plan([len(prompt) for prompt in prompts], slots)
    lora, vectors = stepper.backends.choose(lora, backend), []
    for padded, expected in zip((False, True), rows, strict=True):
        layout = stepper._lay_out([prompts[i] for i in order], lora, padded=padded)
        assert layout.lora.rows == expected
        with torch.inference_mode():
            vectors.append(stepper._forward(layout, layout.buffer)[: len(prompts)])
    return vectors


@pytest.fixture
def stepper(tmp_path: Path) -> Iterator[Runner]:
    """One that rounds batches up as on a GPU."""
    engine = Engine(EngineConfig(make_model(tmp_path / "model"), slots=8))
    engine.stepper._rounds = True
    yield engine.stepper
    engine.stop()


@pytest.fixture(scope="module")
def padded_engines(
    tmp_path_factory: pytest.TempPathFactory, adapter_specs: list[AdapterSpec]
) -> Callable[[str], tuple[Engine, list[int]]]:
    """An engine by pooling, two adapters in its slots; its threads do not run."""
    made: dict[str, tuple[Engine, list[int]]] = {}

    def engine(pooling: str) -> tuple[Engine, list[int]]:
        if pooling not in made:
            made[pooling] = _engine(
                tmp_path_factory.mktemp(pooling), pooling, [spec.path for spec in adapter_specs[:2]]
            )
        return made[pooling]

    return engine


def _engine(folder: Path, pooling: str, adapters: list[Path]) -> tuple[Engine, list[int]]:
    said: dict[str, Any] = {"pooling": pooling}
    engine = Engine(EngineConfig(make_model(folder / "model", **said), slots=2, base_aliases=("*",)))
    engine.start()
    slots = []
    for path in adapters:
        engine.load(ref(path))
        slot = engine.slot_of(ref(path))
        assert slot is not None
        slots.append(slot)
    engine.stop()
    return engine, slots
