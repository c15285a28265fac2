"""Batches rounded up: what a bucket holds, and that padding changes no vector."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranklet.kernels.batch import plan
from ranklet.replicas.bucket import Bucket
from ranklet.replicas.engine import Engine
from tests.assets.make import AdapterSpec, make_model
from tests.replicas.asking import ref

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


@given(LENGTHS)
def test_a_bucket_holds_the_batch_and_little_more(lengths: list[int]) -> None:
    bucket, asked = Bucket.of(lengths), sum(lengths)
    filled = bucket.filled(lengths)
    assert filled[: len(lengths)] == tuple(lengths)
    assert (sum(filled), len(filled)) == (bucket.tokens, bucket.prompts)
    assert max(filled) <= bucket.longest
    assert 0 <= bucket.tokens - asked < max(16, asked / 8)
    assert bucket.prompts <= 2 * len(lengths)


def test_buckets_are_few_and_fixed_points() -> None:
    found = {Bucket.of([tokens]).tokens for tokens in range(1, 8193)}
    assert len(found) <= 64
    assert all(Bucket.of([tokens]).tokens == tokens for tokens in found)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("backend", ["none", "native", "csgmv"])
@pytest.mark.parametrize("lengths", [[1], [16], [5, 1, 3], [20, 4, 8], [7] * 9, [70, 40, 1, 3]], ids=str)
def test_padding_changes_no_vector(
    pooling: str, backend: str, lengths: list[int], padded_engines: Callable[[str], tuple[Engine, list[int]]]
) -> None:
    engine, slots = padded_engines(pooling)
    stepper = engine.stepper
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for length in lengths]
    chosen = [None if backend == "none" else (None, *slots)[(i + 1) % 3] for i in range(len(lengths))]
    order, lora = plan(lengths, chosen)
    lora = replace(lora, backend=backend if lora.segments else "none")
    ordered = [prompts[i] for i in order]
    vectors = []
    for padded in (False, True):
        layout = stepper._lay_out(ordered, lora, padded=padded)
        assert layout.lora.rows == (Bucket.of(lengths).tokens if padded else sum(lengths))
        with torch.inference_mode():
            vectors.append(stepper._forward(layout, layout.buffer)[: len(lengths)])
    assert torch.isfinite(vectors[1]).all()
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-5, atol=1e-5)


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
    from ranklet.replicas.config import EngineConfig

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
