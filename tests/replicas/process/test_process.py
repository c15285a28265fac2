"""An engine in a process of its own: the same answers and errors, and an end for every call when it dies."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import AnswerSink
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.errors import (
    InvalidAdapter,
    InvalidRequest,
    ModelError,
    RankletError,
    Saturated,
    Unavailable,
)
from ranklet.replicas.process.process import EngineProcess
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import PATIENCE_S, ask, ref, submit, until

PROMPTS = [np.arange(1, length, dtype=np.int32) for length in (5, 40, 9)]


class Records(Listener):
    def __init__(self) -> None:
        self.batches: list[BatchRecord] = []
        self.tiers: list[str] = []

    def batch(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def tier_hit(self, tier: str) -> None:
        self.tiers.append(tier)


RECORDS = Records()


@pytest.fixture(scope="module")
def remote(model_dir: Path) -> Iterator[EngineProcess]:
    made = EngineProcess(EngineConfig(model_dir, slots=2, max_waiting_tokens=2000), RECORDS)
    made.start()
    yield made
    made.stop()


def test_answers_equal_those_of_an_engine_in_this_process(
    remote: EngineProcess, engine: Engine, adapter_specs: list[AdapterSpec]
) -> None:
    for adapter in (None, ref(adapter_specs[0].path)):
        ours = submit(remote, PROMPTS, adapter, key_name="team").result(PATIENCE_S)
        theirs = ask(engine, PROMPTS, adapter)
        np.testing.assert_allclose(ours.result, theirs.result, atol=1e-5)
        assert (ours.prompt_tokens, ours.backend) == (theirs.prompt_tokens, theirs.backend)
    assert ours.compute_s > 0
    until(lambda: sum(record.tokens for record in RECORDS.batches) >= 2 * sum(map(len, PROMPTS)))
    assert RECORDS.tiers[:1] == ["disk"]


def test_loaded_adapters_are_in_the_snapshot(remote: EngineProcess, adapter_specs: list[AdapterSpec]) -> None:
    spec = adapter_specs[1]
    info = remote.load(ref(spec.path))
    assert info.name == spec.path.name
    until(lambda: spec.path.name in remote.held().resident)
    assert set(remote.snapshot().resident) == set(remote.held().resident)
    assert remote.snapshot().slots == 2


def test_errors_keep_their_type_and_fields(remote: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="dimensions: expected"):
        submit(remote, PROMPTS, dimensions=10**6).result(PATIENCE_S)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidAdapter) as refused:
        submit(remote, PROMPTS, ref(tmp_path)).result(PATIENCE_S)
    assert refused.value.findings
    assert refused.value.param == "model"
    with pytest.raises(InvalidAdapter):
        remote.load(ref(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json"):
        EngineProcess(EngineConfig(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "error", [InvalidAdapter("a", ["x", "y"]), Saturated("s", retry_after_s=7.0), Unavailable("u")]
)
def test_an_error_survives_pickling(error: RankletError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_cancelled_request_leaves_no_open_call(remote: EngineProcess) -> None:
    long = [np.ones(1000, dtype=np.int32)]
    first = submit(remote, long)
    ticket = remote.submit(
        long, None, EmbedParams(), AnswerSink(lambda result: pytest.fail("cancelled requests are not answered"))
    )
    ticket.cancel()
    first.result(PATIENCE_S)
    submit(remote, PROMPTS).result(PATIENCE_S)
    assert remote.open_calls == 0


def test_the_process_ends_with_its_parent(model_dir: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ranklet.replicas.config import EngineConfig;"
        "from ranklet.replicas.process.process import EngineProcess;"
        "engine = EngineProcess(EngineConfig(Path(sys.argv[1])));"
        "print(engine.pid, 'torch' in sys.modules, flush=True); os._exit(0)"
    )
    said = subprocess.run([sys.executable, "-c", program, str(model_dir)], capture_output=True, text=True, check=True)
    pid, torch_here = said.stdout.split()
    assert torch_here == "False"
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
