"""Adapters are loaded, replaced and refused while an engine runs."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import (
    AdapterNotFound,
    InvalidAdapter,
)
from tests.assets.adapters import AdapterSpec, save_adapter
from tests.assets.broken import BROKEN, sound
from tests.assets.corpus import TEXTS
from tests.assets.hanging import hanging
from tests.assets.oracle import cosine, reference_embedding
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit
from tests.replicas.engine.recording import Expected, MakeEngine, Prompts, RecordingListener


def test_the_tier_is_where_the_request_found_the_adapter(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tokens: Prompts
) -> None:
    records = RecordingListener()
    engine = make_engine(listener=records, slots=1)
    engine.start()
    one, two = (ref(spec.path) for spec in adapter_specs[:2])
    tiers = [ask(engine, tokens[:1], each).tier for each in (one, one, two, one, None)]
    assert tiers == ["disk", "gpu", "disk", "host", None]
    assert records.tiers == ["disk", "gpu", "disk", "host"]
    assert records.gone == [one.name, two.name]
    shot = engine.snapshot()
    assert shot.resident == (one.name,)
    assert set(shot.hosted) == {one.name, two.name}


def test_a_folder_replaced_under_its_name_is_a_new_revision(
    engine: Engine, model_dir: Path, tmp_path: Path, tokens: Prompts
) -> None:
    def saved(folder: str, seed: int) -> Path:
        return save_adapter(model_dir, tmp_path / folder, r=8, target_modules=["q_proj", "up_proj"], seed=seed)

    folder = saved("live", 1)
    old = ref(folder)
    before = ask(engine, tokens, old).result
    assert_same(before, reference_embedding(model_dir, folder, TEXTS[:8]))
    other = saved("other", 2)
    shutil.copy(other / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    new = ref(folder)
    assert new.revision != old.revision
    after = ask(engine, tokens, new).result
    assert_same(after, reference_embedding(model_dir, other, TEXTS[:8]))
    assert max(cosine(a, b) for a, b in zip(before, after, strict=True)) < 0.999
    assert_same(ask(engine, tokens, old).result, before)  # requests for the old revision still get it


def test_a_bad_folder_fails_its_own_requests_only(
    engine: Engine,
    model_dir: Path,
    tmp_path: Path,
    tokens: Prompts,
    expected: Expected,
    adapter_specs: list[AdapterSpec],
) -> None:
    bad = ref(BROKEN["nan"].make(model_dir, tmp_path / "nan"))
    gone = AdapterRef("gone", str(tmp_path / "gone"), "1")
    good = ref(adapter_specs[0].path)
    with engine.paused():
        futures = {each: submit(engine, tokens, each) for each in (bad, gone, good, None)}
    with pytest.raises(InvalidAdapter, match="NaN"):
        futures[bad].result(PATIENCE_S)
    with pytest.raises(AdapterNotFound):
        futures[gone].result(PATIENCE_S)
    assert_same(futures[good].result(PATIENCE_S).result, expected[good.name])
    assert_same(futures[None].result(PATIENCE_S).result, expected[None])
    with pytest.raises(InvalidAdapter, match="NaN"):  # remembered: refused at once, with the same findings
        submit(engine, tokens, bad)
    with pytest.raises(InvalidAdapter, match="NaN"):
        engine.load(bad)


def test_load_returns_the_adapters_facts(engine: Engine, adapter_specs: list[AdapterSpec], tmp_path: Path) -> None:
    for spec in adapter_specs:
        info = engine.load(ref(spec.path))
        assert (info.name, info.rank, set(info.modules)) == (spec.name, spec.rank, set(spec.targets))
        assert spec.name in engine.snapshot().resident
    with pytest.raises(AdapterNotFound):
        engine.load(AdapterRef("gone", str(tmp_path / "gone"), "1"))


def test_concurrent_loads_share_one_slot(make_engine: MakeEngine, adapter_specs: list[AdapterSpec]) -> None:
    engine = make_engine(slots=1)
    engine.start()
    with ThreadPoolExecutor(12) as threads:
        infos = list(threads.map(engine.load, [ref(spec.path) for spec in adapter_specs * 2]))
    assert [info.name for info in infos] == [spec.name for spec in adapter_specs * 2]


def test_a_slow_load_delays_no_other_request(
    make_engine: MakeEngine,
    model_dir: Path,
    tmp_path: Path,
    tokens: Prompts,
    expected: Expected,
    adapter_specs: list[AdapterSpec],
) -> None:
    engine = make_engine(slots=3)
    engine.start()
    resident, fresh, slow = (
        ref(adapter_specs[0].path),
        ref(adapter_specs[1].path),
        ref(sound(model_dir, tmp_path / "slow")),
    )
    engine.load(resident)
    with hanging(tmp_path / "slow" / WEIGHTS_FILE):
        stuck = submit(engine, tokens, slow)
        for _ in range(3):
            assert_same(ask(engine, tokens).result, expected[None])
            assert_same(ask(engine, tokens, resident).result, expected[resident.name])
        assert_same(ask(engine, tokens, fresh).result, expected[fresh.name])
        assert not stuck.done()
        assert engine.snapshot().waiting_adapters == ("slow",)
    assert_same(stuck.result(PATIENCE_S).result, reference_embedding(model_dir, tmp_path / "slow", TEXTS[:8]))
