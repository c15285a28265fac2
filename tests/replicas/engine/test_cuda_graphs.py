"""Steps replayed as CUDA graphs give the same vectors, whichever adapters are in the slots."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.model.decoder import ignore_stage
from tests.bench.shapes import decoder, write_adapters, write_model
from tests.replicas.asking import ask, launch, ref, vectors_of

pytestmark = pytest.mark.gpu
SHAPE = decoder("Qwen3Model", layers=3, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, vocab=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("replay")
    write_model(made / "model", SHAPE)
    write_adapters(made / "some", 3, shape=SHAPE, rank=16)
    write_adapters(made / "more", 3, shape=SHAPE, rank=64, modules=("q_proj", "down_proj"))
    return made


@pytest.fixture(params=["csgmv", "native"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = Engine(
        EngineConfig(folder / "model", slots=2, backend=request.param, max_batch_tokens=20_000, kv_cache_bytes=0)
    )
    running.start()
    yield running
    running.stop()


def draw(*lengths: int) -> list[NDArray[np.int32]]:
    return [np.random.default_rng(length).integers(0, 1000, length, dtype=np.int32) for length in lengths]


def adapters(folder: Path) -> list[AdapterRef | None]:
    return [None, *(ref(path, f"{path.parent.name}-{path.name}") for path in sorted(folder.glob("*/ad*")))]


def test_a_replayed_step_gives_the_same_answer(folder: Path, engine: Engine) -> None:
    """Six adapters take turns in two slots, so graphs are replayed with other adapters than they were captured with."""
    first: dict[tuple[AdapterRef | None, tuple[int, ...]], NDArray[np.float32]] = {}
    for turn in range(4):
        for adapter in adapters(folder):
            for lengths in ((7,), (300, 5, 16)):
                vectors = ask(engine, draw(*lengths), adapter).result
                wanted = first.setdefault((adapter, lengths), vectors)
                np.testing.assert_allclose(vectors, wanted, atol=2e-3, err_msg=f"turn {turn}, {adapter}, {lengths}")
    graphs, again = engine.runner.graphs, adapters(folder)[1]
    assert graphs is not None
    held = len(graphs)
    assert held >= (4 if engine.config.backend == "csgmv" else 2), "native's graphs are for one load of an adapter"
    for _ in range(4):
        np.testing.assert_allclose(ask(engine, draw(7), again).result, first[again, (7,)], atol=2e-3)
    assert len(graphs) == held + (engine.config.backend == "native")
    distinct = [vectors[0] for (_, lengths), vectors in first.items() if lengths == (7,)]
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(distinct) for b in distinct[:i])


def test_two_replays_in_flight_do_not_mix(folder: Path, engine: Engine) -> None:
    prompts = [draw(9), [np.full(9, 3, dtype=np.int32)]]
    for _ in range(4):
        alone = [vectors_of(launch(engine, one, [None])) for one in prompts]
    running: list[LaunchedStep] = [launch(engine, one, [None]) for one in prompts * 3]
    for i, one in enumerate(running):
        assert torch.equal(torch.from_numpy(vectors_of(one)), torch.from_numpy(alone[i % 2]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_graph_serves_a_bucket(folder: Path, dtype: str) -> None:
    """Steps of other lengths, numbers of prompts and adapters have the same vectors, replayed or not.

    Except in float32, whose attention reads lengths on the host: a graph is for one batch's lengths there.
    """
    some = adapters(folder)[1:3]
    running, plain = (
        Engine(EngineConfig(folder / "model", slots=2, backend="csgmv", dtype=dtype, kv_cache_bytes=0))
        for _ in range(2)
    )
    plain.runner.graphs, plain.runner.pads = None, False
    for one in (running, plain):
        one.start()
        for adapter in some:
            assert adapter is not None
            one.load(adapter)
    rng = np.random.default_rng(0)
    for turn in range(60):
        total = int(rng.choice((30, 250, 1400, 6000)))
        cuts = sorted(set(rng.integers(1, total, rng.integers(0, 9)).tolist()))
        lengths = np.diff([0, *cuts, total]).tolist()
        prompts = [rng.integers(0, 1000, length, dtype=np.int32) for length in lengths]
        slots = [(None, 0, 1)[int(rng.integers(3))] for _ in lengths]
        ours, wanted = (vectors_of(launch(one, prompts, slots)) for one in (running, plain))
        cosines = (ours * wanted).sum(1)
        assert cosines.min() >= 0.9999, f"turn {turn}: {lengths} {slots}: {cosines.min()}"
    graphs = running.runner.graphs
    assert graphs is not None
    assert len(graphs) <= 40
    assert len(graphs) >= 4 or dtype == "float32"
    for one in (running, plain):
        one.stop()


def test_steps_of_other_lengths_share_a_graph(folder: Path, engine: Engine) -> None:
    """Each step follows one of other lengths, with and without adapters."""
    if engine.config.backend != "csgmv":
        pytest.skip("native's graphs are for the same lengths")
    adapter = adapters(folder)[1]
    assert engine.runner.graphs is not None
    assert adapter is not None
    engine.load(adapter)
    slot = engine.slot_of(adapter)
    turns = [draw(100, 3), draw(60, 40), draw(1, 99), draw(51, 50)]  # 112 tokens, 8 prompts with what fills them
    plain = [[vectors_of(launch(engine, one, [at] * 2, ignore_stage)) for one in turns] for at in (None, slot)]
    held = 0
    for _ in range(3):
        for at, wanted in zip((None, slot), plain, strict=True):
            for one, vectors in zip(turns, wanted, strict=True):
                cosines = (vectors_of(launch(engine, one, [at] * 2)) * vectors).sum(1)
                assert cosines.min() >= 0.9999
        held = held or len(engine.runner.graphs)
    assert len(engine.runner.graphs) == held == 2, "one without adapters, one with"


def test_a_filler_may_be_longer_than_the_longest_prompt(folder: Path) -> None:
    """The rotary table has no positions beyond the longest prompt of the model."""
    engine = Engine(EngineConfig(folder / "model", slots=2, max_model_len=24, kv_cache_bytes=0))
    prompts = draw(*[24] * 50)
    plain = vectors_of(launch(engine, prompts, [None] * 50, ignore_stage))
    for _ in range(4):
        ours = vectors_of(launch(engine, prompts, [None] * 50))
        assert (ours * plain).sum(1).min() >= 0.9999
    engine.stop()


def test_large_steps_and_steps_after_clearing_are_launched(folder: Path, engine: Engine) -> None:
    assert engine.runner.graphs is not None
    for _ in range(4):
        ask(engine, draw(17_000), None)
    assert len(engine.runner.graphs) == 0
    for _ in range(4):
        kept = ask(engine, draw(12), None).result
    assert len(engine.runner.graphs) == 1
    engine.runner.free_caches()
    assert len(engine.runner.graphs) == 0
    for _ in range(4):
        np.testing.assert_allclose(ask(engine, draw(12), None).result, kept, atol=2e-3)
    assert len(engine.runner.graphs) == 1, "captured again after all were dropped"


def test_full_steps_share_a_graph(folder: Path) -> None:
    """Nearly full steps are replayed although they are large; fillers take the missing tokens."""
    engine = Engine(EngineConfig(folder / "model", slots=2, backend="csgmv", max_batch_tokens=20_000, kv_cache_bytes=0))
    adapter = adapters(folder)[1]
    assert engine.runner.graphs is not None
    assert adapter is not None
    engine.start()
    engine.load(adapter)
    slot, rng = engine.slot_of(adapter), np.random.default_rng(0)
    for turn in range(6):
        lengths = [1500, *rng.integers(880, 920, 19).tolist()]
        lengths.append(19_990 - turn - sum(lengths))
        prompts = [rng.integers(0, 1000, length, dtype=np.int32) for length in lengths]
        slots = [(None, slot)[int(rng.integers(2))] for _ in prompts]
        plain = vectors_of(launch(engine, prompts, slots, ignore_stage))
        assert (vectors_of(launch(engine, prompts, slots)) * plain).sum(1).min() >= 0.9999
    assert len(engine.runner.graphs) == 1
    engine.stop()
