"""Steps of text have few graph keys, and the usual ones are captured before requests come."""

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ranklet.kernels.sampling_row import Column, Feature
from ranklet.replicas.adapters.pool import SlotContents
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import StepItems
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.text_warmup import run_step, text_steps
from tests.assets.make import make_model

ROWS, SLOTS, LONGEST, MOST_TOKENS = 300, 24, 4096, 16_384


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PagedRunner]:
    """Steps of an engine on the CPU, padded as on a GPU. Every slot has an adapter of all modules."""
    folder = make_model(tmp_path_factory.mktemp("keys") / "model", pooling=None)
    config = EngineConfig(
        folder, slots=SLOTS, max_rank=16, max_batch_requests=ROWS, max_batch_tokens=MOST_TOKENS, max_model_len=LONGEST,
        kv_cache_bytes=64 << 20, padded_steps=True,
    )  # fmt: skip
    engine = Engine(config)
    engine.start()
    steps = engine.steps.paged
    assert steps is not None
    with engine.runner.pool.placeholder_adapters(in_layers=True):
        yield steps
    engine.stop()


def key_of(paged: PagedRunner, items: StepItems) -> Hashable:
    order, lora = items.lora(paged.table)
    return paged.graph_key(paged.packer.pack(items, order, paged.runner.backends.choose(lora, "csgmv")))


@pytest.fixture(scope="module")
def captured(paged: PagedRunner) -> set[Hashable]:
    """The keys that the warm-up captures."""
    keys = set[Hashable]()

    def note(items: StepItems, launched_s: float) -> LaunchedStep:
        keys.add(key_of(paged, items))
        return LaunchedStep([], "none", launched_s, 0.0, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "launch_items", note)
        for step in text_steps(paged, LONGEST):
            if step.captured:
                run_step(paged, step, LONGEST)
    assert len(keys) <= 320, "each takes the start of an engine some ten milliseconds"
    return keys


@pytest.fixture
def draw(paged: PagedRunner) -> Callable[[np.random.Generator, int, int, int], StepItems]:
    """Draw a step of some decodes, and of some prompts with some tokens together."""

    def drawn(rng: np.random.Generator, decodes: int, prompts: int, tokens: int) -> StepItems:
        table, rows = paged.table, np.arange(ROWS, dtype=np.int32)
        used = rng.permutation(SLOTS)[: rng.integers(1, SLOTS + 1)]
        table.slots[:ROWS] = np.where(rng.random(ROWS) < rng.choice([0.0, 0.3, 1.0]), -1, rng.choice(used, ROWS))
        longest = int(rng.choice((100, 1024, LONGEST)))
        table.lengths[:ROWS] = rng.integers(1, longest + 1, ROWS)
        flags = (Feature(0), Feature.NOISE, Feature.NOISE | Feature.TRUNCATE)
        table.sampling[:ROWS, Column.FLAGS] = rng.choice([int(each) for each in flags], ROWS)
        pieces, slots = list[TokenSpan](), list[int | None]()
        for row, length in enumerate(divided(rng, tokens, prompts), decodes):
            start = int(rng.integers(0, max(1, LONGEST - length))) if rng.random() < 0.3 else 0
            head = paged.text if rng.random() < 0.8 or not decodes else None
            pieces.append(TokenSpan(np.zeros(length, dtype=np.int32), start, head, row))
            slots.append(None if table.slots[row] < 0 else int(table.slots[row]))
        return StepItems(rows[:decodes], pieces, slots)

    return drawn


def divided(rng: np.random.Generator, tokens: int, parts: int) -> list[int]:
    cuts: NDArray[np.int64] = np.sort(rng.permutation(np.arange(1, tokens))[: parts - 1])
    return [int(each) for each in np.diff([0, *cuts, tokens])] if parts else []


Draw = Callable[[np.random.Generator, int, int, int], StepItems]


def test_every_step_of_decodes_is_captured_before_requests_come(
    paged: PagedRunner, captured: set[Hashable], draw: Draw
) -> None:
    """Whatever the number of rows, their adapters, their contexts, and whether they are greedy."""
    rng, keys = np.random.default_rng(0), set[Hashable]()
    for turn in range(1500):
        count = turn % ROWS + 1 if turn < ROWS else int(rng.integers(1, ROWS + 1))
        keys.add(key_of(paged, draw(rng, count, 0, 0)))
    assert keys <= captured
    assert len(keys) >= 40, "the steps differ"


def test_keys_of_short_steps_do_not_depend_on_modules(paged: PagedRunner, captured: set[Hashable], draw: Draw) -> None:
    rng, pool, names = np.random.default_rng(0), paged.runner.pool, ("q_proj", "down_proj")
    few = [
        SlotContents(frozenset(module for module in held.modules if module[1] == names[slot % 2]))
        for slot, held in enumerate(pool.contents)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "contents", few)
        for decodes, prompts, tokens in ((1, 0, 0), (300, 0, 0), (20, 3, 200), (0, 1, 700), (250, 16, 1700)):
            assert key_of(paged, draw(rng, decodes, prompts, tokens)) in captured


def test_short_steps_with_prompts_are_captured_before_requests_come(
    paged: PagedRunner, captured: set[Hashable], draw: Draw
) -> None:
    rng, keys = np.random.default_rng(0), set[Hashable]()
    for _ in range(1000):
        prompts = int(rng.integers(1, 17))
        tokens = int(np.clip(rng.lognormal(np.log(300), 1.2), prompts, 2048 - 256))
        keys.add(key_of(paged, draw(rng, int(rng.integers(0, 257)), prompts, tokens)))
    assert keys <= captured
    assert len(keys) >= 40, "the steps differ"


@pytest.mark.parametrize("adapters", [0, 1, 4, SLOTS])
def test_large_steps_of_a_burst_are_captured_before_requests_come(
    paged: PagedRunner, captured: set[Hashable], adapters: int
) -> None:
    table, head = paged.table, paged.text
    for decodes in (0, 1, 40, 100, 256):
        for prompts, length in ((8, 300), (14, 512), (40, 130), (16, 496)):
            count = decodes + prompts
            table.slots[:count] = np.arange(count) % adapters if adapters else -1
            table.lengths[:decodes] = 700
            slots = [None if slot < 0 else slot for slot in table.slots[decodes:count].tolist()]
            pieces = [TokenSpan(np.zeros(length, dtype=np.int32), 0, head, decodes + i) for i in range(prompts)]
            items = StepItems(np.arange(decodes, dtype=np.int32), pieces, slots)
            assert key_of(paged, items) in captured, (decodes, prompts, length)


def test_steps_of_any_prompts_have_few_keys(paged: PagedRunner, draw: Draw) -> None:
    """Most steps must find a graph."""
    rng, keys, found, turns = np.random.default_rng(0), set[Hashable](), 0, 2000
    for turn in range(turns):
        prompts = int(np.clip(rng.lognormal(np.log(8), 1.0), 1, 40))
        tokens = int(np.clip(rng.lognormal(np.log(1500), 1.0), 64 * prompts, LONGEST))
        key = key_of(paged, draw(rng, int(rng.integers(0, ROWS - 40)), prompts, tokens))
        found += key in keys and turn >= turns // 2
        keys.add(key)
    assert len(keys) <= 400
    assert found >= 0.85 * turns / 2


def test_full_steps_share_graphs(paged: PagedRunner, draw: Draw) -> None:
    rng = np.random.default_rng(0)
    keys = {
        key_of(paged, draw(rng, decodes := int(rng.integers(1, 200)), 40, MOST_TOKENS - decodes)) for _ in range(200)
    }
    assert len(keys) <= 8


def test_fillers_fit_into_a_step_of_the_largest_size(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", pooling=None)
    engine = Engine(EngineConfig(folder, max_batch_tokens=100, max_model_len=90, padded_steps=True))
    engine.start()
    paged = engine.steps.paged
    assert paged is not None
    items = StepItems(np.zeros(0, dtype=np.int32), [TokenSpan(np.zeros(80, dtype=np.int32), 0, paged.text, 0)], [None])
    order, lora = items.lora(paged.table)
    assert paged.packer.pack(items, order, lora).sizes.tokens == 100
    engine.stop()
