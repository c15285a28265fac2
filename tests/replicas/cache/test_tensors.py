"""The pages on the device: their layout, and how many of them fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ranklet.kernels import paged_spans
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.cache.tensors import KvPages, page_bytes, pages_that_fit
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import Architecture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


def fitting(
    architecture: Architecture, device: torch.device, length: int = 64, reserve: int = 0, rows: int = 0, **fields: Any
) -> int:
    config = EngineConfig(Path("model"), **fields)
    return pages_that_fit(architecture, torch.float32, device, config, length, reserve, rows)


@pytest.fixture
def page(architecture: Architecture) -> int:
    return page_bytes(architecture, torch.float32)


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch, page: int) -> int:
    """Pretend that a GPU has this much free memory."""
    free = 100 * page
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    return free


def test_kernels_and_pool_agree_on_the_size_of_a_page() -> None:
    assert paged_spans.PAGE_TOKENS == PAGE_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_views_of_one_tensor(architecture: Architecture, dtype: torch.dtype) -> None:
    cache = KvPages(architecture, 3, CPU, dtype)
    shape = (3, architecture.kv_heads, PAGE_TOKENS, architecture.head_dim)
    for index in range(architecture.layers):
        layer = cache.layer(index)
        assert layer.keys.shape == layer.values.shape == shape
        assert layer.keys.is_contiguous()
        assert layer.values.is_contiguous()
        layer.keys.fill_(2 * index)
        layer.values.fill_(2 * index + 1)
    assert cache.pages[:, :, 0, 0, 0, 0].flatten().tolist() == list(range(2 * architecture.layers))
    assert cache.count == 3
    assert cache.nbytes == cache.pages.nbytes == 3 * page_bytes(architecture, dtype)


def test_a_gpu_gives_a_fraction_of_the_memory_that_is_free_beside_the_reserve(
    architecture: Architecture, free_bytes: int, page: int
) -> None:
    assert fitting(architecture, CUDA) == 90
    assert fitting(architecture, CUDA, kv_cache_fraction=0.5) == 50
    assert fitting(architecture, CUDA, reserve=20 * page) == 72
    assert fitting(architecture, CUDA, reserve=20 * page, kv_cache_bytes=8 * page - 1) == 7


def test_rows_of_tokens_keep_their_memory(architecture: Architecture, free_bytes: int, page: int) -> None:
    """It is taken after the pages, once an adapter needs it."""
    assert fitting(architecture, CUDA, rows=20 * page) == 72
    assert fitting(architecture, CUDA, reserve=20 * page, rows=30 * page) == 45
    assert fitting(architecture, CUDA, rows=20 * page, kv_cache_bytes=80 * page) == 80
    with pytest.raises(ModelError, match=rf"at most {80 * page}, .* beside weights, slots and rows of tokens"):
        fitting(architecture, CUDA, rows=20 * page, kv_cache_bytes=80 * page + 1)
    with pytest.raises(ModelError, match=r"Of 0 free bytes.* Lower max_model_len, slots, token_rows"):
        fitting(architecture, CUDA, rows=200 * page)


@pytest.mark.parametrize("reserve", [0, 99, 200])
def test_too_little_memory_is_refused_with_both_numbers(
    architecture: Architecture, free_bytes: int, page: int, reserve: int
) -> None:
    length = 91 * PAGE_TOKENS - 63
    assert fitting(architecture, CUDA, length - 1) == 90
    with pytest.raises(ModelError) as refused:
        fitting(architecture, CUDA, length, reserve * page)
    got = int(max(free_bytes - reserve * page, 0) * 0.9)
    assert f"at least {91 * page} bytes (91 pages of {page} bytes)" in str(refused.value)
    assert f"max_model_len ({length}) tokens, got {got}. Of {free_bytes} free bytes" in str(refused.value)
    assert f"steps and graphs need {reserve * page}. Lower max_model_len" in str(refused.value)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_budget_in_bytes_overrides(
    architecture: Architecture, device: torch.device, free_bytes: int, page: int
) -> None:
    assert fitting(architecture, device, kv_cache_bytes=5 * page) == 5
    with pytest.raises(ModelError, match=r"kv_cache_bytes: expected at least .* Raise kv_cache_bytes"):
        fitting(architecture, device, 5 * PAGE_TOKENS + 1, kv_cache_bytes=5 * page)


def test_a_budget_that_a_gpu_does_not_have_is_refused(architecture: Architecture, free_bytes: int) -> None:
    with pytest.raises(ModelError, match=f"kv_cache_bytes: expected at most {free_bytes}, .* got {free_bytes + 1}"):
        fitting(architecture, CUDA, kv_cache_bytes=free_bytes + 1)


def test_a_cpu_has_a_default_budget_that_holds_one_prompt(architecture: Architecture, page: int) -> None:
    usual = 256 * MIB // page
    assert fitting(architecture, CPU) == usual
    assert fitting(architecture, CPU, usual * PAGE_TOKENS + 1) == usual + 1
