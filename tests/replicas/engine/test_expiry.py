"""Requests of an adapter whose files hang are refused in time; other requests are served."""

import contextlib
import shutil
import time
from pathlib import Path

import numpy as np

from ranklet.replicas.adapters.loader import READERS
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import StillLoading
from tests.assets.hanging import hanging
from tests.replicas.asking import PATIENCE_S, ask, ref, submit


def test_requests_wait_for_a_hanging_disk_only_up_to_the_timeout(
    model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    shutil.copytree(adapters_dir / "legal-v2", stuck)
    engine = Engine(EngineConfig(model_dir, slots=2, load_timeout_s=0.2))
    engine.start()
    prompt = [np.arange(1, 9, dtype=np.int32)]
    medical, late = ref(adapters_dir / "medical"), ref(stuck)
    with hanging(stuck / "adapter_model.safetensors"):
        waiting = submit(engine, prompt, late)
        assert ask(engine, prompt, medical).result.shape == (1, 128)
        assert engine.held().loading == ("stuck",)
        assert engine.held().used_slots == 2
        assert not waiting.done()
        deadline_s = time.monotonic() + PATIENCE_S
        while not waiting.done():
            assert time.monotonic() < deadline_s
            engine.expire()
        assert isinstance(waiting.exception(), StillLoading)
        assert ask(engine, prompt, medical).tier == "gpu"
    assert ask(engine, prompt, late).result.shape == (1, 128), "the load goes on after its requests were refused"
    engine.stop()


def test_loads_that_cannot_start_take_no_slots(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    """When every loader thread hangs, further adapters wait without a slot, and their requests are refused in time."""
    engine = Engine(EngineConfig(model_dir, slots=READERS + 1, load_timeout_s=0.2))
    engine.start()
    prompt = [np.arange(1, 9, dtype=np.int32)]
    medical, late = ref(adapters_dir / "medical"), ref(adapters_dir / "legal-v2")
    assert ask(engine, prompt, medical).tier == "disk"
    with contextlib.ExitStack() as hung:
        stuck = []
        for number in range(READERS):
            folder = tmp_path / f"stuck{number}"
            shutil.copytree(adapters_dir / "legal-v2", folder)
            read = ref(folder)
            hung.enter_context(hanging(folder / "adapter_model.safetensors"))
            stuck.append(submit(engine, prompt, read))
        deadline_s = time.monotonic() + PATIENCE_S
        while len(engine.held().loading) < READERS:
            assert time.monotonic() < deadline_s
        waiting = submit(engine, prompt, late)
        assert ask(engine, prompt, medical).tier == "gpu"
        assert late.name not in engine.held().loading
        while not (waiting.done() and all(one.done() for one in stuck)):
            assert time.monotonic() < deadline_s
            engine.expire()
        assert all(isinstance(one.exception(), StillLoading) for one in (waiting, *stuck))
        assert ask(engine, prompt, medical).tier == "gpu"
    assert ask(engine, prompt, late).result.shape == (1, 128)
    engine.stop()


def test_loads_that_hang_give_their_slots_back(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    engine = Engine(EngineConfig(model_dir, slots=2, load_timeout_s=PATIENCE_S))
    engine.start()
    prompt = [np.arange(1, 9, dtype=np.int32)]
    medical = ref(adapters_dir / "medical")
    with contextlib.ExitStack() as hung:
        stuck = []
        for name in ("stuck1", "stuck2"):
            folder = tmp_path / name
            shutil.copytree(adapters_dir / "legal-v2", folder)
            read = ref(folder)
            hung.enter_context(hanging(folder / "adapter_model.safetensors"))
            stuck.append(submit(engine, prompt, read))
        deadline_s = time.monotonic() + PATIENCE_S
        while engine.held().used_slots < 2:
            assert time.monotonic() < deadline_s
        waiting = submit(engine, prompt, medical)
        while not waiting.done():
            assert time.monotonic() < deadline_s
            engine.expire()
            time.sleep(0.01)
        assert waiting.result().result.shape == (1, 128)
        assert set(engine.held().loading) == {"stuck1", "stuck2"}
        assert not any(one.done() for one in stuck)
    assert all(one.result(PATIENCE_S).result.shape == (1, 128) for one in stuck), "their requests were not refused"
    engine.stop()
