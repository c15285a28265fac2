"""A slot holds its adapter and nothing of the previous one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ranklet.kernels.packs import PACKS
from ranklet.kernels.stack import padded_rank
from ranklet.replicas.adapters.adapter import AdapterWeights, ColumnTerms
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.packed import pack
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import EMBEDDING, LORA_MODULES
from tests.assets.adapters import AdapterSpec, save_adapter
from tests.replicas.asking import ref

MakePool = Callable[[], AdapterPool]


def memory(pool: AdapterPool, slot: int) -> torch.Tensor:
    """All matrices of a slot, from the tensors that kernels read."""
    parts = [
        part[slot].flatten()
        for stacks in pool.layers
        for stack in (stacks.qkv, stacks.o, stacks.gate_up, stacks.down)
        if stack is not None
        for part in (stack.a, stack.b)
    ]
    if pool.embedding is not None:
        parts += [pool.embedding.a[slot].flatten(), pool.embedding.b[slot].flatten()]
    return torch.cat(parts)


def metadata(pool: AdapterPool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ranks and scalings of every stack, from the tensors that kernels read."""
    stacks = [stack for layer in pool.layers for stack in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [(stack.ranks, stack.scalings) for stack in (*stacks, pool.embedding) if stack is not None]


@pytest.fixture
def adapters(adapter_specs: list[AdapterSpec], expectation: ExpectedModules) -> dict[str, AdapterWeights]:
    return {spec.name: read_adapter(ref(spec.path), expectation) for spec in adapter_specs}


def test_nothing_of_the_previous_adapter_remains(make_pool: MakePool, adapters: dict[str, AdapterWeights]) -> None:
    """After any other adapter, an adapter gives the bits that it gives in a new pool."""
    ready = {name: pack(adapter, torch.float32) for name, adapter in adapters.items()}
    fresh = {}
    for name, packed in ready.items():
        pool = make_pool()
        pool.load(0, packed)
        fresh[name] = memory(pool, 0)
    used = make_pool()
    for first in ready:
        for second in ready:
            used.load(0, ready[first])
            used.load(0, ready[second])
            assert torch.equal(memory(used, 0), fresh[second]), f"{second} over {first}"


def test_an_adapter_of_rank_8_replaces_one_of_rank_32(
    make_pool: MakePool, model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    both = ["q_proj", "down_proj", "embed_tokens"]
    large = save_adapter(model_dir, tmp_path / "large", r=32, target_modules=both)
    small = save_adapter(model_dir, tmp_path / "small", r=8, target_modules=both)
    reused, fresh = make_pool(), make_pool()
    packed = pack(read_adapter(ref(small), expectation), torch.float32)
    reused.load(1, pack(read_adapter(ref(large), expectation), torch.float32))
    reused.load(1, packed)
    fresh.load(1, packed)
    assert torch.equal(memory(reused, 1), memory(fresh, 1))
    assert memory(fresh, 1).any()
    assert not memory(reused, 0).any(), "the other slot is unchanged"


def test_ranks_and_scalings_of_a_slot_are_known_on_the_cpu(
    make_pool: MakePool, adapters: dict[str, AdapterWeights]
) -> None:
    pool = make_pool()
    for adapter in adapters.values():
        pool.load(0, pack(adapter, torch.float32))
        assert pool.ranks(0) == {place: weight.rank for place, weight in adapter.weights.items()}
        for layer, stacks in enumerate(pool.layers):
            for name, modules in PACKS.items():
                meta = getattr(stacks, name).meta[0]
                for module, rank, scaling in zip(modules, meta.ranks, meta.scalings, strict=True):
                    weight = adapter.weights.get((layer, module))
                    assert rank == (weight.rank if weight else 0)
                    assert scaling == (weight.scaling if weight else 0.0)
        assert pool.embedding is not None
        weight = adapter.weights.get((EMBEDDING, "embed_tokens"))
        assert pool.embedding.meta[0].ranks == ((weight.rank if weight else 0),)


def test_every_matrix_is_at_its_slice_of_the_stack(make_pool: MakePool, adapters: dict[str, AdapterWeights]) -> None:
    pool = make_pool()
    for adapter in adapters.values():
        pool.load(1, pack(adapter, torch.float32))
        for (layer, name), weight in adapter.weights.items():
            if layer == EMBEDDING:
                assert pool.embedding is not None
                assert torch.equal(pool.embedding.a[1, :, : weight.rank], weight.a.t())
                assert torch.equal(pool.embedding.b[1, :, : weight.rank], weight.b)
                continue
            pack_name = next(key for key, names in PACKS.items() if name in names)
            stack = getattr(pool.layers[layer], pack_name)
            index = PACKS[pack_name].index(name)
            a = stack.a[1, index * 64 : (index + 1) * 64]
            b = stack.b[1, sum(stack.widths[:index]) : sum(stack.widths[: index + 1])]
            assert torch.equal(a[: weight.rank], weight.a)
            assert torch.equal(b[:, : weight.rank], weight.b)
            assert not a[weight.rank :].any()
            assert not b[:, weight.rank :].any()


def test_slots_with_column_terms_have_equal_modules(make_pool: MakePool, adapters: dict[str, AdapterWeights]) -> None:
    """CUDA graphs are kept by these sets."""
    pool = make_pool()
    packed = pack(next(iter(adapters.values())), torch.float32)
    terms = {module: ColumnTerms(torch.ones(1), torch.zeros(1)) for module in packed.layout.modules if module[0] >= 0}
    for slot in range(2):
        pool.load(slot, replace(packed, terms=terms))
    assert all(each.terms for each in pool.contents[:2])
    assert {each.modules for each in pool.contents[:2]} == {packed.layout.modules}


def test_packing_rounds_to_the_pools_dtype(adapters: dict[str, AdapterWeights]) -> None:
    adapter = adapters["medical"]
    packed = pack(adapter, torch.bfloat16)
    assert packed.flat.dtype == torch.bfloat16
    assert packed.nbytes == 2 * sum(weight.a.numel() + weight.b.numel() for weight in adapter.weights.values())
    assert packed.modules == tuple(sorted({name for _, name in adapter.weights}))
    for piece in packed.layout.pieces:
        weight = adapter.weights[piece.module]
        assert torch.equal(piece.view(packed.flat), (weight.a if piece.side == "a" else weight.b).bfloat16())


def test_a_pool_has_no_memory_for_modules_that_it_leaves_out(architecture: Architecture) -> None:
    def pool(*modules: str) -> AdapterPool:
        return AdapterPool(architecture, 3, 20, modules, torch.device("cpu"), torch.float32)

    attention = pool("q_proj", "o_proj")
    assert attention.embedding is None
    assert attention.layers[0].down is attention.layers[0].gate_up is None
    assert attention.layers[0].qkv is not None
    assert attention.rank == 32
    everything = pool(*LORA_MODULES)
    assert everything.nbytes > attention.nbytes
    assert everything.nbytes == 3 * 4 * memory(everything, 0).numel(), "every byte of a slot belongs to a stack"


@pytest.mark.parametrize(("rank", "kept"), [(1, 16), (8, 16), (16, 16), (17, 32), (64, 64)])
def test_ranks_are_padded_to_sixteens(rank: int, kept: int) -> None:
    assert padded_rank(rank) == kept


def test_a_pool_is_empty_after_placeholder_adapters(
    make_pool: Callable[[], AdapterPool], adapters: dict[str, AdapterWeights]
) -> None:
    pool = make_pool()
    size = pool.nbytes
    with pool.placeholder_adapters(terms=True):
        assert set(pool.ranks(1).values()) == {pool.rank}
        assert pool.contents[1].terms
        assert pool.nbytes > size
    assert pool.nbytes == size
    assert not pool.contents[1].terms
    assert pool.ranks(1) == {}
    adapter = next(iter(adapters.values()))
    pool.load(0, pack(adapter, torch.float32))
    assert pool.ranks(0) == {place: weight.rank for place, weight in adapter.weights.items()}
    assert pool.ranks(1) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_slot_on_a_gpu_equals_one_on_the_cpu(
    architecture: Architecture, adapters: dict[str, AdapterWeights], dtype: torch.dtype
) -> None:
    """Every adapter over every other, bit for bit: a kernel writes the slot on the GPU, torch the one on the CPU."""
    cpu, gpu = (AdapterPool(architecture, 2, 64, LORA_MODULES, torch.device(at), dtype) for at in ("cpu", "cuda"))
    gpu.compile_load()
    for _ in range(2):
        for adapter in adapters.values():
            packed = pack(adapter, dtype)
            for pool in (cpu, gpu):
                pool.load(1, packed)
            assert torch.equal(memory(cpu, 1), memory(gpu, 1).cpu())
            assert cpu.ranks(1) == gpu.ranks(1)
            for (ranks, scalings), (their_ranks, their_scalings) in zip(metadata(cpu), metadata(gpu), strict=True):
                assert torch.equal(ranks, their_ranks.cpu())
                assert torch.equal(scalings, their_scalings.cpu())
    assert not memory(gpu, 0).any()
