"""A load waits for the device once, at its end, and rows of tokens add few operations to it.

On a GPU, each copy that waits costs a load more than its bytes: the device is idle until Python gives it the next one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranklet.kernels.token_rows import PAGE
from ranklet.replicas.adapters.adapter import AdapterRows, ColumnTerms, OwnRows
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.packed import PackedAdapter, pack
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import LORA_MODULES
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import ref

META = torch.device("meta")  # has no memory; copies to it are dispatched as those to a GPU


class DeviceOperations(TorchDispatchMode):
    """Counts what is dispatched for the device.

    Attributes:
        copies: for each copy from the host, whether it waits.
        others: other operations than copies and views.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[bool] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        devices = {each.device for each in tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)}
        if META in devices and len(devices) > 1:
            is_copy = func is torch.ops.aten.copy_.default  # whose third argument is `non_blocking`
            self.copies.append(not (args[2:] == (True,) if is_copy else kwargs.get("non_blocking")))
        elif META in devices and not func.is_view:
            self.others.append(str(func))
        return found


@pytest.fixture(name="kinds")
def _kinds(
    adapter_specs: list[AdapterSpec], expectation: ExpectedModules, architecture: Architecture
) -> dict[str, PackedAdapter]:
    adapter = read_adapter(ref(adapter_specs[0].path), expectation)
    embedding, head = (
        OwnRows(torch.arange(count, dtype=torch.int32), torch.randn(count, architecture.hidden))
        for count in (100, 5 * PAGE)
    )
    terms = {(layer, name): ColumnTerms(torch.ones(1), torch.zeros(1)) for layer, name in adapter.weights if layer >= 0}
    return {
        "plain": pack(adapter, torch.float32),
        "rows": pack(replace(adapter, rows=AdapterRows(embedding)), torch.float32),
        "shared rows": pack(replace(adapter, rows=AdapterRows(embedding, embedding)), torch.float32),
        "rows of both": pack(replace(adapter, rows=AdapterRows(embedding, head)), torch.float32),
        "terms": pack(replace(adapter, terms=terms), torch.float32),
    }


def pool_on(device: torch.device, architecture: Architecture) -> AdapterPool:
    return AdapterPool(architecture, 2, 64, LORA_MODULES, device, torch.float32)


def test_rows_add_few_operations_to_a_load_and_none_waits(
    kinds: dict[str, PackedAdapter], architecture: Architecture
) -> None:
    pool = pool_on(META, architecture)
    found = {}
    for name, packed in kinds.items():
        pool.load(0, packed)  # the first one of a kind may allocate memory
        with DeviceOperations() as operations:
            pool.load(1, packed)
        found[name] = operations
        assert not any(operations.copies), name
    plain = found["plain"]
    for name in ("rows", "shared rows", "rows of both"):
        assert len(found[name].copies) <= len(plain.copies) + 3
        assert len(found[name].others) <= len(plain.others) + 2


@contextmanager
def no_waits() -> Iterator[None]:
    torch.set_deterministic_debug_mode("default")  # as in an engine
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_operation_of_a_load_waits_for_a_gpu(kinds: dict[str, PackedAdapter], architecture: Architecture) -> None:
    pool = pool_on(torch.device("cuda"), architecture)
    for packed in kinds.values():
        pool.load(0, packed)
        with no_waits():
            pool.load(1, packed)
