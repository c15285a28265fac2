"""After `precompile`, no batch compiles a kernel."""

import random

import pytest
import torch

from ranklet.kernels import csgmv
from ranklet.kernels.batch import cut, plan
from ranklet.kernels.expand import expand_kernel
from ranklet.kernels.fused_gemm import gemm_kernel
from ranklet.kernels.gated_mlp import gated_kernel
from ranklet.kernels.precompile import batches, precompile
from ranklet.kernels.rotary import Rotary, rotary_kernel
from ranklet.kernels.shrink import shrink_kernel
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tuning.random_lora import ProjectionShape, random_lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = (shrink_kernel, expand_kernel, gemm_kernel, gated_kernel, rotary_kernel)


@pytest.mark.parametrize("slots", [1, 8, 300])
def test_batches_have_tiles_of_every_height(slots: int) -> None:
    found = list(batches(slots, 30_000))
    assert len(found) <= 40
    assert all(1 <= batch.adapters <= slots and batch.lora_rows <= batch.rows for batch in found)
    for rows in (4096, 30_000):
        assert [tiles.height for batch in found if batch.rows == rows for tiles in cut(batch)] == [
            height for height in (16, 32, 64, 128) for _ in range(2)
        ]


def test_stacks_are_not_written() -> None:
    stack = random_lora(ProjectionShape("o", 32, (16,)), 8, 3, device=DEVICE, dtype=torch.float16).stack
    tensors, meta = (stack.a, stack.b, stack.ranks, stack.scalings), list(stack.meta)
    before = [tensor.clone() for tensor in tensors]
    precompile([stack], 64)
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    assert stack.meta == meta


@pytest.mark.gpu
def test_random_batches_compile_nothing_after_it() -> None:
    slots, most_rows = 64, 8192
    loras = [
        random_lora(ProjectionShape(name, wide, widths), rank, slots, device=DEVICE, dtype=torch.bfloat16)
        for name, wide, widths, rank in (
            ("qkv", 1024, (2048, 1024, 1024), 64),
            ("gate_up", 1024, (3072, 3072), 16),
            ("down", 3072, (1024,), 64),
        )
    ]
    places = torch.zeros(most_rows, dtype=torch.int32, device=DEVICE)
    rotary = Rotary(None, torch.ones(64, 64, device=DEVICE), torch.ones(64, 64, device=DEVICE), places, 16, 8, 1e-6)
    precompile([LinearStack(p.stack.a, p.stack.b, p.stack.widths) for p in loras], most_rows, rotary)
    compiled = [set(kernel.device_caches[0][0]) for kernel in KERNELS]
    draw = random.Random(0)
    for _ in range(40):
        longest = draw.choice((1, 20, 100, 900))
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, most_rows // longest // 2))][:512]
        _, batch = plan(lengths, [draw.choice((None, *range(slots))) for _ in lengths])
        for p in loras:
            x = torch.randn(batch.rows, p.projection.wide, device=DEVICE, dtype=torch.bfloat16)
            rotation = rotary.rows(most_rows - batch.rows) if p.projection.name == "qkv" else None
            placed = batch.with_tiles(DEVICE)
            csgmv.linear(x, p.weight, None, p.stack, placed, rotation)
            if p.projection.name == "gate_up":
                csgmv.gated(x, p.weight, None, p.stack, placed)
    found = [set(kernel.device_caches[0][0]) for kernel in KERNELS]
    assert [more - known for more, known in zip(found, compiled, strict=True)] == [set()] * len(KERNELS)
