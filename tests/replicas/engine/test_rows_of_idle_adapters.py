"""Idle adapters lose their slots where others need their rows of tokens; those in use keep them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from ranklet.kernels.token_rows import PAGE
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import InvalidAdapter, Unavailable
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.assets.token_rows import save_token_adapter
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit, until
from tests.replicas.engine.recording import RecordingListener
from tests.replicas.streaming import GREEDY, TextSink, draw

PROMPT = draw(20)
ONE_PAGE = ("first", "second", "third")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("rows") / "model", hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2,
        head_dim=16, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    """Adapters whose rows take one page, two, many, or none."""
    kinds = {**dict.fromkeys(ONE_PAGE, "tokens"), "both": "tokens-of-both", "all": "all-rows", "plain": "plain"}
    return {name: save_token_adapter(model, model.parent / name, kind) for name, kind in kinds.items()}


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def engine(model: Path, listener: RecordingListener) -> Iterator[Engine]:
    """An engine with more slots than adapters, and two pages of rows."""
    config = EngineConfig(model, slots=8, token_rows=2 * PAGE, max_batch_tokens=1024, kv_cache_bytes=8 << 20)
    running = Engine(config, listener)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def load(engine: Engine, folders: dict[str, Path]) -> Callable[..., None]:
    def load(*names: str) -> None:
        for name in names:
            engine.load(ref(folders[name]))

    return load


def resident(engine: Engine) -> set[str]:
    return set(engine.snapshot().resident)


def test_the_least_recently_used_ones_with_rows_are_evicted(
    engine: Engine, model: Path, folders: dict[str, Path], listener: RecordingListener, load: Callable[..., None]
) -> None:
    load("plain", "first", "second")
    ask(engine, PROMPT, ref(folders["first"]))
    load("third")
    assert resident(engine) == {"plain", "first", "third"}
    load("both")
    assert resident(engine) == {"plain", "both"}
    assert listener.gone == ["second", "first", "third"]
    for name in ("first", "third", "both", "second", "plain"):
        folder = folders[name]
        assert_same(ask(engine, PROMPT, ref(folder)).result, reference_embedding(model, folder, PROMPT))


def test_an_adapter_that_gives_up_its_slot_gives_up_its_rows(
    engine: Engine, folders: dict[str, Path], listener: RecordingListener, load: Callable[..., None]
) -> None:
    load("both")
    assert engine.release("both")
    load("first", "second")
    assert resident(engine) == {"first", "second"}
    assert not listener.gone


def test_more_rows_than_all_are_refused_and_evict_none(engine: Engine, load: Callable[..., None]) -> None:
    load("first", "second")
    with pytest.raises(InvalidAdapter, match=r"rows differ from .* this server keeps 32"):
        load("all")
    assert resident(engine) == {"first", "second"}


def test_pinned_adapters_keep_their_rows(engine: Engine, load: Callable[..., None]) -> None:
    engine.pin(["first"])
    load("first", "second")
    with pytest.raises(Unavailable, match=r"this adapter has 32, 16 of the 32 .* are free beside those of adapters"):
        load("both")
    assert resident(engine) == {"first", "second"}, "no adapter was evicted"
    load("third")
    assert resident(engine) == {"first", "third"}


def test_adapters_of_running_texts_keep_their_rows(
    engine: Engine, model: Path, folders: dict[str, Path], load: Callable[..., None]
) -> None:
    """The text waits at its first token until the others are answered."""
    began, go_on = Event(), Event()

    def wait() -> None:
        began.set()
        go_on.wait(PATIENCE_S)

    text = TextSink(wait)
    load("second")
    engine.submit(PROMPT, ref(folders["first"]), GREEDY, text)
    try:
        assert began.wait(PATIENCE_S)
        with pytest.raises(Unavailable, match="Try again later"):
            load("both")
        refused = submit(engine, PROMPT, ref(folders["both"]))
        with pytest.raises(Unavailable, match="Try again later"):
            refused.result(PATIENCE_S)
        load("third")
        assert resident(engine) == {"first", "third"}
    finally:
        go_on.set()
    assert len(text.generation().choices[0].tokens) == GREEDY.max_tokens
    assert_same(ask(engine, PROMPT, ref(folders["both"])).result, reference_embedding(model, folders["both"], PROMPT))


def test_a_prefetch_leaves_recently_used_adapters_their_rows(
    engine: Engine, folders: dict[str, Path], listener: RecordingListener, load: Callable[..., None]
) -> None:
    load("first", "second")
    engine.prefetch(ref(folders["both"]))
    until(lambda: listener.loads[-1].adapter == "both")
    assert resident(engine) == {"first", "second"}
    load("both")
    assert resident(engine) == {"both"}
