"""The pointwise steps: torch against transformers' own modules, Triton (interpreted, and on CUDA) against float64."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from ranklet.kernels import fused

EPS = 1e-6
SHAPES = [(1, 48), (7, 130), (5, 1)]  # rows, width
HEADS = [(1, 4, 2, 48), (6, 3, 1, 6), (5, 2, 2, 64), (3, 1, 1, 2)]  # tokens, query heads, key heads, head width


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rotary64(
    qkv: Tensor, norms: tuple[Tensor, Tensor] | None, positions: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Head by head in float64; angles of position p are p / 100**(i / half)."""
    query, key, width = shape
    out, half = qkv.double().clone(), width // 2
    angle = positions.double()[:, None] / 100 ** (torch.arange(half, dtype=torch.float64) / half)
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


def qkv_case(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    tokens, query, key, width = shape
    norms = ((1 + 0.2 * torch.randn(width)).to(dtype), (1 + 0.2 * torch.randn(width)).to(dtype))
    return (
        torch.randn(tokens, (query + 2 * key) * width).to(dtype),
        norms,
        torch.randint(40, (tokens,), dtype=torch.int32),
    )


# torch, against the modules the oracle's model is made of


def test_rms_norm_is_transformers_own() -> None:
    x, norm = 3 * torch.randn(9, 96), Qwen3RMSNorm(96, eps=EPS)
    weight = 1 + 0.2 * torch.randn(96)
    norm.weight.data.copy_(weight)
    assert_close(fused.rms_norm(x, weight, EPS), norm(x).detach(), rtol=1e-6, atol=1e-6)


def test_add_rms_norm_adds_in_place_and_norms_the_sum() -> None:
    x, residual, weight = torch.randn(9, 96), torch.randn(9, 96), 1 + 0.2 * torch.randn(96)
    total = x + residual
    assert_close(fused.add_rms_norm(x, residual, weight, EPS).double(), norm64(total, weight), rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, total)


def test_norm_and_rotation_are_transformers_own() -> None:
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=48)
    rotary = Qwen3RotaryEmbedding(config)
    q_norm, k_norm = Qwen3RMSNorm(48, eps=EPS), Qwen3RMSNorm(48, eps=EPS)
    for norm in (q_norm, k_norm):
        norm.weight.data.copy_(1 + 0.2 * torch.randn(48))
    qkv, positions = torch.randn(7, (4 + 2 * 2) * 48), torch.tensor([0, 1, 2, 3, 0, 1, 900])
    cos, sin = rotary(qkv, positions[None])
    q, k, v = qkv.view(1, 7, 8, 48).split((4, 2, 2), dim=2)
    q, k = apply_rotary_pos_emb(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)
    expected = torch.cat([q.transpose(1, 2), k.transpose(1, 2), v], dim=2).view(7, -1).detach()
    angle = torch.outer(torch.arange(901).float(), rotary.inv_freq)
    fused.qk_norm_rope_(
        qkv, (q_norm.weight.detach(), k_norm.weight.detach()), angle.cos(), angle.sin(), positions,
        query_heads=4, key_heads=2, eps=EPS,
    )  # fmt: skip
    assert_close(qkv, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_against_float64(shape: tuple[int, int, int, int], normed: bool) -> None:
    qkv, norms, positions = qkv_case(shape, torch.float32)
    used = norms if normed else None
    expected = rotary64(qkv, used, positions, shape[1:])
    cos, sin = tables(shape[3] // 2)
    fused.qk_norm_rope_(qkv, used, cos, sin, positions, query_heads=shape[1], key_heads=shape[2], eps=EPS)
    assert_close(qkv.double(), expected, rtol=1e-5, atol=1e-5)


def test_silu_mul_is_the_mlps_activation() -> None:
    mlp = Qwen3MLP(Qwen3Config(hidden_size=8, intermediate_size=20))
    x = torch.randn(5, 8)
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        expected = mlp.act_fn(gate) * up
    assert_close(fused.silu_mul(torch.cat([gate, up], dim=1)), expected)


def test_no_rows_at_all() -> None:
    assert fused.rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert fused.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert fused.silu_mul(torch.empty(0, 16)).shape == (0, 8)
    cos, sin = tables(4)
    fused.qk_norm_rope_(
        torch.empty(0, 32), None, cos, sin, torch.empty(0, dtype=torch.int32), query_heads=2, key_heads=1, eps=EPS
    )


# Triton, interpreted on the CPU: the launchers ask for CUDA, so the two without a launch helper are called as there


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("add", [True, False])
def test_interpreted_norm(interpreted_fused: ModuleType, rows: int, width: int, add: bool) -> None:
    x, residual, weight, out = (
        *(torch.randn(rows, width) for _ in range(2)),
        torch.randn(width),
        torch.empty(rows, width),
    )
    total = x + residual if add else x
    interpreted_fused._launch_rms_norm(x, residual, weight, out, EPS, add=add)
    assert_close(out.double(), norm64(total, weight), rtol=1e-5, atol=1e-5)
    assert not add or torch.equal(residual, total)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("normed", [True, False])
def test_interpreted_rotation(interpreted_fused: ModuleType, shape: tuple[int, int, int, int], normed: bool) -> None:
    (tokens, query, key, _), half = shape, shape[3] // 2
    qkv, norms, positions = qkv_case(shape, torch.float32)
    expected = rotary64(qkv, norms if normed else None, positions, shape[1:])
    cos, sin = tables(half)
    q_weight, k_weight = norms if normed else (cos, cos)
    interpreted_fused._qk_rope_kernel[(tokens,)](
        qkv, q_weight, k_weight, cos, sin, positions, EPS, qkv.stride(0), Q=query, HEADS=query + key, HALF=half,
        BLOCK_HEADS=_power_of_2(query + key), BLOCK_HALF=_power_of_2(half), NORM=normed,
    )  # fmt: skip
    assert_close(qkv.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_silu_mul(interpreted_fused: ModuleType, rows: int, width: int) -> None:
    gate_up, out = torch.randn(rows, 2 * width), torch.empty(rows, width)
    interpreted_fused._silu_mul_kernel[(rows, -(-width // 64))](gate_up, out, H=width, BLOCK=64)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(out.double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-5)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


# Triton, compiled

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (0, 64), (513, 1024), (3, 5120)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_norms_on_cuda(rows: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = (1 + 0.2 * torch.randn(width)).to(dtype)
    out = fused.rms_norm(x.cuda(), weight.cuda(), EPS)
    assert_close(out.cpu().double(), norm64(x, weight), rtol=tolerance, atol=tolerance)
    held = residual.cuda()
    out = fused.add_rms_norm(x.cuda(), held, weight.cuda(), EPS)
    total = (x.float() + residual.float()).to(dtype)
    assert torch.equal(held.cpu(), total)
    assert_close(out.cpu().double(), norm64(total, weight), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*HEADS, (0, 4, 2, 48), (300, 16, 8, 128)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rotation_on_cuda(shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype, tolerance: float) -> None:
    qkv, norms, positions = qkv_case(shape, dtype)
    used = norms if normed else None
    expected = rotary64(qkv, used, positions, shape[1:])
    (cos, sin), on_device = tables(shape[3] // 2), qkv.cuda()
    fused.qk_norm_rope_(
        on_device, used and (used[0].cuda(), used[1].cuda()), cos.cuda(), sin.cuda(), positions.cuda(),
        query_heads=shape[1], key_heads=shape[2], eps=EPS,
    )  # fmt: skip
    assert_close(on_device.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    values = (shape[1] + shape[2]) * shape[3]
    assert torch.equal(on_device.cpu()[:, values:], qkv[:, values:]), "value heads are left alone"


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (0, 64), (257, 3072)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_silu_mul_on_cuda(rows: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    gate_up = torch.randn(rows, 2 * width).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    out = fused.silu_mul(gate_up.cuda())
    assert_close(out.cpu().double(), gate * gate.sigmoid() * up, rtol=tolerance, atol=tolerance)
