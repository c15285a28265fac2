"""The pointwise steps: torch against transformers' modules, Triton (interpreted and compiled) against float64."""

import pytest
import torch
import triton
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from ranklet.kernels import pointwise

EPS = 1e-6
SHAPES = [(1, 48), (7, 130), (5, 1)]  # rows, width
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles the kernels on a GPU")


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


# torch against transformers


def test_rms_norm_agrees_with_transformers() -> None:
    x, norm = 3 * torch.randn(9, 96), Qwen3RMSNorm(96, eps=EPS)
    weight = 1 + 0.2 * torch.randn(96)
    norm.weight.data.copy_(weight)
    assert_close(pointwise.rms_norm(x, weight, EPS), norm(x).detach(), rtol=1e-6, atol=1e-6)


def test_add_rms_norm_adds_in_place_and_norms_the_sum() -> None:
    x, residual, weight = torch.randn(9, 96), torch.randn(9, 96), 1 + 0.2 * torch.randn(96)
    total = x + residual
    assert_close(pointwise.add_rms_norm(x, residual, weight, EPS).double(), norm64(total, weight), rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, total)


def test_silu_mul_agrees_with_transformers() -> None:
    mlp = Qwen3MLP(Qwen3Config(hidden_size=8, intermediate_size=20))
    x = torch.randn(5, 8)
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        expected = mlp.act_fn(gate) * up
    assert_close(pointwise.silu_mul(torch.cat([gate, up], dim=1)), expected)


def test_no_rows() -> None:
    assert pointwise.rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert pointwise.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert pointwise.silu_mul(torch.empty(0, 16)).shape == (0, 8)


# Triton, interpreted on the CPU. The launchers use Triton only on CUDA, so the kernels are called directly.


@interpreted
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("add", [True, False])
def test_interpreted_norm(rows: int, width: int, add: bool) -> None:
    x, residual, weight, out = (
        *(torch.randn(rows, width) for _ in range(2)),
        torch.randn(width),
        torch.empty(rows, width),
    )
    total = x + residual if add else x
    block = triton.next_power_of_2(width)
    pointwise.rms_norm_kernel[(rows,)](x, residual, weight, out, EPS, H=width, BLOCK=block, ADD=add)
    assert_close(out.double(), norm64(total, weight), rtol=1e-5, atol=1e-5)
    assert not add or torch.equal(residual, total)


@interpreted
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_silu_mul(rows: int, width: int) -> None:
    gate_up, out = torch.randn(rows, 2 * width), torch.empty(rows, width)
    pointwise.silu_mul_kernel[(rows, -(-width // 64))](gate_up, out, H=width, BLOCK=64)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(out.double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-5)


# Triton, compiled

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (0, 64), (513, 1024), (3, 5120)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_norms_on_cuda(rows: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = (1 + 0.2 * torch.randn(width)).to(dtype)
    out = pointwise.rms_norm(x.cuda(), weight.cuda(), EPS)
    assert_close(out.cpu().double(), norm64(x, weight), rtol=tolerance, atol=tolerance)
    held = residual.cuda()
    out = pointwise.add_rms_norm(x.cuda(), held, weight.cuda(), EPS)
    total = (x.float() + residual.float()).to(dtype)
    assert torch.equal(held.cpu(), total)
    assert_close(out.cpu().double(), norm64(total, weight), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (0, 64), (257, 3072)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_silu_mul_on_cuda(rows: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    gate_up = torch.randn(rows, 2 * width).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    out = pointwise.silu_mul(gate_up.cuda())
    assert_close(out.cpu().double(), gate * gate.sigmoid() * up, rtol=tolerance, atol=tolerance)
