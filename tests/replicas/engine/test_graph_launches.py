"""A CUDA graph replays launches, so steps with equal keys must launch the same kernels with the same arguments."""

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.nn import functional
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels import paged_attention
from ranklet.kernels.prefill_attention import prefill_triton
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine import paged_layout
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import StepItems
from ranklet.replicas.model import attention, row_decoder, sampler
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.adapters import save_adapter
from tests.assets.make import make_model
from tests.replicas.asking import ref

ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]}, {"target_modules": ["down_proj"]}, {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj"], "use_dora": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
]  # fmt: skip
Launches = list[tuple[Any, ...]]


class ListedGraphs:
    """Takes the place of the cache of graphs, and lists the launches of each step by its key."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches
        self.by_key: dict[Hashable, list[Launches]] = {}

    def run(self, key: Hashable, inputs: Tensor, forward: Callable[[Tensor], Any]) -> Any:
        self._launches.clear()
        outputs = forward(inputs)
        self.by_key.setdefault(key, []).append(list(self._launches))
        return outputs


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that are launched from now on. They do not run."""
    found: Launches = []

    def run(function: Any, *args: Any, **options: Any) -> None:
        found.append((function.fn.__name__, [*map(_fact, args)], {name: _fact(each) for name, each in options.items()}))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return found


@pytest.fixture
def lengths_on_host(engine: Engine, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention within a step be launched by sequence, as in float32 on a GPU, and list it too."""
    attend = functional.scaled_dot_product_attention

    def attended(*args: Any, **options: Any) -> Tensor:
        launches.append(("attention", [*map(_fact, args)], {}))
        return attend(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attended)
    monkeypatch.setattr(engine.runner, "pads", False)


def _fact(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return value.shape, value.strides, value.block_shape
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(row_decoder, "supports", lambda _: True)  # this and the next ones are as on a Hopper GPU
    monkeypatch.setattr(attention, "prefill", prefill_triton)
    monkeypatch.setattr(attention, "decode", paged_attention.decode_triton)
    monkeypatch.setattr(paged_attention, "decode", paged_attention.decode_triton)
    monkeypatch.setattr(sampler, "sample_by_torch", sampler.sample_by_kernels)
    folder = make_model(
        tmp_path / "model", architecture="llama", tied=False, layers=1, hidden_size=64, intermediate_size=96,
        head_dim=16,
    )  # fmt: skip
    config = EngineConfig(
        folder, slots=len(ADAPTERS), max_rank=16, max_batch_tokens=4096, max_batch_requests=64, kv_cache_bytes=4 << 20,
        backend="csgmv", lora_modules=ALL_MODULES, padded_steps=True,
    )  # fmt: skip
    engine = Engine(config)
    engine.start()
    for i, fields in enumerate(ADAPTERS):
        engine.load(ref(save_adapter(folder, tmp_path / f"adapter{i}", r=4, **fields)))
    yield engine
    engine.stop()


@pytest.mark.usefixtures("lengths_on_host")
@pytest.mark.parametrize("longest", [40, 1100])
def test_steps_with_pages(longest: int, engine: Engine, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, paged, graphs = np.random.default_rng(0), engine.steps.paged, ListedGraphs(launches)
    assert paged is not None
    monkeypatch.setattr(paged_layout, "SHORT_STEP", 64)
    monkeypatch.setattr(engine.runner, "graphs", graphs)
    table = paged.table
    for _ in range(400):
        decodes, used = int(rng.integers(4)), rng.integers(-1, len(ADAPTERS), 2)
        table.slots[:decodes], table.lengths[:decodes] = rng.choice(used, decodes), 5
        spans, slots = list[TokenSpan](), list[int]()
        for row in range(decodes, decodes + int(rng.integers(decodes == 0, 3))):
            head = (None, paged.text, engine.heads.last)[int(rng.integers(3))]
            ids = np.zeros(rng.choice((4, 7, longest, longest + 3)), dtype=np.int32)
            spans.append(TokenSpan(ids, 0, head, None if head is engine.heads.last and rng.integers(2) else row))
            slots.append(int(rng.choice(used)))
        items = StepItems(np.arange(decodes, dtype=np.int32), spans, [None if at < 0 else at for at in slots])
        paged.launch_items(items, 0.0)
    check(graphs)


def test_steps_without_pages(engine: Engine, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, graphs = np.random.default_rng(0), ListedGraphs(launches)
    monkeypatch.setattr(engine.runner, "graphs", graphs)
    heads = [engine.heads.choose(mode, normalize=True, skips=False) for mode in ("last", "mean")]
    for _ in range(400):
        count, used = int(rng.integers(1, 4)), rng.integers(-1, len(ADAPTERS), 2)
        spans = [
            TokenSpan(np.zeros(rng.choice((4, 7, 40)), dtype=np.int32), 0, heads[int(rng.integers(2))])
            for _ in range(count)
        ]
        engine.runner.launch(spans, [None if at < 0 else int(at) for at in rng.choice(used, count)])
    check(graphs)


def check(graphs: ListedGraphs) -> None:
    assert sum(len(found) > 1 and bool(found[0]) for found in graphs.by_key.values()) >= 20
    for key, (first, *others) in graphs.by_key.items():
        for other in others:
            assert [each[0] for each in other] == [each[0] for each in first], key
            assert other == first, key
