"""Norm and rotation of queries and keys, in a kernel of its own and in the fused product, against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from ranklet.kernels import csgmv, fused_gemm
from ranklet.kernels.batch import plan
from ranklet.kernels.kv_write import KvWrite
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages
from ranklet.kernels.rotary import Rotary, rotary_kernel
from ranklet.kernels.tiles import FusedTile
from tests.kernels import oracle
from tests.kernels.fixed_tiles import fuse_small_batches
from tests.kernels.paged import check_stored, make_kv_write

EPS = 1e-6
HEADS = [(1, 4, 2, 48), (6, 3, 1, 6), (5, 2, 2, 64), (3, 1, 1, 2), (0, 4, 2, 48)]  # tokens, Q, G, head width
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rotary64(qkv: Tensor, rotary: Rotary) -> Tensor:
    """Return norm and rotation head by head in float64. Position p has the angles p / 100**(i / half)."""
    query, key, half, norms = rotary.query_heads, rotary.key_heads, rotary.half, rotary.norms
    out, width = qkv.double().clone(), 2 * half
    angle = rotary.positions.double()[:, None] / 100 ** (torch.arange(half, dtype=torch.float64) / half)
    for head in range(query + key):
        place = slice(head * width, (head + 1) * width)
        value = out[:, place]
        if norms is not None:
            value = norm64(value, norms[0 if head < query else 1])
        low, high = value[:, :half], value[:, half:]
        out[:, place] = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], 1)
    return out


def tables(half: int, known: int = 40) -> tuple[Tensor, Tensor]:
    angle = torch.arange(known).double()[:, None] / 100 ** (torch.arange(half, dtype=torch.float64) / half)
    return angle.cos().float(), angle.sin().float()


def make_rotary(shape: tuple[int, int, int, int], dtype: torch.dtype, *, normed: bool) -> Rotary:
    tokens, query, key, width = shape
    norms = ((1 + 0.2 * torch.randn(width)).to(dtype), (1 + 0.2 * torch.randn(width)).to(dtype)) if normed else None
    return Rotary(norms, *tables(width // 2), torch.randint(40, (tokens,), dtype=torch.int32), query, key, EPS)


def on(device: torch.device, rotary: Rotary) -> Rotary:
    norms = rotary.norms and (rotary.norms[0].to(device), rotary.norms[1].to(device))
    cos, sin, positions = (tensor.to(device) for tensor in (rotary.cos, rotary.sin, rotary.positions))
    kv = rotary.kv and KvWrite(rotary.kv.slots.to(device), LayerPages(*(part.to(device) for part in rotary.kv.pages)))
    return Rotary(norms, cos, sin, positions, rotary.query_heads, rotary.key_heads, EPS, kv)


def test_torch_agrees_with_transformers() -> None:
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=48)
    embedding = Qwen3RotaryEmbedding(config)
    q_norm, k_norm = Qwen3RMSNorm(48, eps=EPS), Qwen3RMSNorm(48, eps=EPS)
    for norm in (q_norm, k_norm):
        norm.weight.data.copy_(1 + 0.2 * torch.randn(48))
    qkv, positions = torch.randn(7, (4 + 2 * 2) * 48), torch.tensor([0, 1, 2, 3, 0, 1, 900])
    cos, sin = embedding(qkv, positions[None])
    q, k, v = qkv.view(1, 7, 8, 48).split((4, 2, 2), dim=2)
    q, k = apply_rotary_pos_emb(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)
    expected = torch.cat([q.transpose(1, 2), k.transpose(1, 2), v], dim=2).view(7, -1).detach()
    angle = torch.outer(torch.arange(901).float(), embedding.inv_freq)
    norms = (q_norm.weight.detach(), k_norm.weight.detach())
    Rotary(norms, angle.cos(), angle.sin(), positions, 4, 2, EPS).apply_(qkv)
    assert_close(qkv, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [*HEADS, (300, 16, 8, 128)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_apply_in_place_and_write(
    shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    tokens, query, key, width = shape
    rotary, qkv = make_rotary(shape, dtype, normed=normed), torch.randn(tokens, (query + 2 * key) * width).to(dtype)
    expected = rotary64(qkv, rotary)
    exact = torch.empty_like(qkv, device=DEVICE)
    stores = on(DEVICE, replace(rotary, kv=make_kv_write(tokens, key, width, dtype)))
    stores.write(qkv.float().clone().to(DEVICE), exact)
    check_stored(exact, stores.kv)
    check_stored(stores.apply_(qkv.clone().to(DEVICE)), stores.kv)
    assert_close(exact.cpu().double(), expected, rtol=tolerance / 2, atol=tolerance / 2)
    out = on(DEVICE, rotary).apply_(qkv.clone().to(DEVICE)).cpu()
    assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[:, (query + key) * width :], qkv[:, (query + key) * width :]), "values are kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles the kernel on a GPU")
@pytest.mark.parametrize("shape", HEADS[:-1])
@pytest.mark.parametrize("normed", [True, False])
def test_the_interpreted_kernel(shape: tuple[int, int, int, int], normed: bool) -> None:
    (tokens, query, key, width), rotary = shape, make_rotary(shape, torch.float32, normed=normed)
    qkv = torch.randn(tokens, (query + 2 * key) * width)
    expected, heads, half = rotary64(qkv, rotary), query + key, rotary.half
    for target, written in ((qkv.clone().fill_(float("nan")), heads + key), (qkv, heads)):
        rotary_kernel[(tokens,)](
            qkv, target, *(rotary.norms or (rotary.cos, rotary.cos)), rotary.cos, rotary.sin, rotary.positions, EPS,
            qkv.stride(0), Q=query, ROTATED=heads, HEADS=written, HALF=half,
            BLOCK_HEADS=1 << (written - 1).bit_length(), BLOCK_HALF=1 << (half - 1).bit_length(), NORM=normed,
        )  # fmt: skip
        assert_close(target.double(), expected, rtol=1e-5, atol=1e-5)
    kv, target = make_kv_write(tokens, key, width, torch.float32), qkv.clone()
    rotary_kernel[(tokens,)](
        qkv, target, rotary.cos, rotary.cos, rotary.cos, rotary.sin, rotary.positions, EPS, qkv.stride(0), Q=query,
        ROTATED=heads, HEADS=heads + key, HALF=half, BLOCK_HEADS=1 << (heads + key - 1).bit_length(),
        BLOCK_HALF=1 << (half - 1).bit_length(), NORM=False, keys=kv.pages.keys, values=kv.pages.values,
        slots=kv.slots, page_stride=kv.pages.keys.stride(0), PAGE=PAGE_TOKENS,
    )  # fmt: skip
    check_stored(target, kv)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [([129, 7, 20], [1, 0, None]), ([150], [1]), ([60, 7], [1, 0]), ([70, 68], [None, None])],
    ids=["long, short and base", "long", "added later", "base"],
)
def test_rotation_in_the_fused_product(
    monkeypatch: pytest.MonkeyPatch, width: int, normed: bool, bias: bool, lengths: list[int], slots: list[int | None]
) -> None:
    query, key, wide, dtype = 512 // width, 256 // width, 128, torch.float16
    widths = (512, 256, 256)
    order, batch = plan(lengths, slots)
    tile = FusedTile(256 if width == 128 else 128, 64, 8, 2 if width == 128 else 1, 8, 3)
    fuse_small_batches(monkeypatch, tile, lambda key: key.height == 128)
    monkeypatch.setattr(fused_gemm, "can_rotate_base", lambda *_: True)
    gemm, rotated, rotaries = fused_gemm.gemm, fused_gemm.rotated, list[Rotary | None]()

    def counted_gemm(*args: Any, **options: Any) -> None:
        rotaries.append(args[8])
        gemm(*args, **options)

    def counted_rotated(*args: Any) -> None:
        rotaries.append(args[4])
        rotated(*args)

    monkeypatch.setattr(fused_gemm, "gemm", counted_gemm)
    monkeypatch.setattr(fused_gemm, "rotated", counted_rotated)
    adapters = oracle.random_adapters({0: (8, 8, 8), 1: (16, 0, 16)}, wide, widths, dtype=dtype)
    stack = oracle.linear_stack(adapters, 2, 16, wide, widths, stale=0.0, device=str(DEVICE))
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    offset = torch.randn(sum(widths)).to(dtype) if bias else None
    rotary = make_rotary((batch.rows, query, key, width), dtype, normed=normed)
    rows = [slots[i] for i in order for _ in range(lengths[i])]
    product = oracle.linear(x, weight, offset, rows, adapters)
    if bias:
        product = oracle.with_terms(product, rows, oracle.give_terms(stack, [1]))
    wanted = rotary64(product, rotary)
    tiled = replace(batch, terms=bias).with_tiles(DEVICE)
    given = (x.to(DEVICE), weight.to(DEVICE), None if offset is None else offset.to(DEVICE), stack, tiled)
    stores = on(DEVICE, replace(rotary, kv=make_kv_write(batch.rows, key, width, dtype)))
    written = csgmv.linear(*given, stores)
    check_stored(written, stores.kv)
    out = written.cpu().double()
    assert (len(rotaries), all(rotaries)) == (0 if lengths == [60, 7] else 1, True)
    assert_close(out, wanted, rtol=3e-3, atol=3e-3 * float(wanted.abs().max()))
    assert (out - wanted).norm() <= 3e-3 * wanted.norm()
