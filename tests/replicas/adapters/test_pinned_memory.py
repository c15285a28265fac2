"""Pinned blocks have exactly the requested size, are used again, and are unpinned before they are unmapped."""

import gc
from pathlib import Path

import pytest
import torch

from ranklet.replicas.adapters.pinned_memory import PinnedMemory


class CudaDriver:
    """Records the two calls of CUDA's runtime."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}  # bytes by address

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert mapped(address), "pinned memory that is not mapped"
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert mapped(address), "unmapped before it was unpinned"
        del self.pinned[address]
        return 0


def mapped(address: int) -> bool:
    """Whether this process has memory mapped at the address."""
    ranges = (line.split(" ", 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    made = CudaDriver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    return made


def test_a_block_has_the_requested_size_and_is_used_again(driver: CudaDriver) -> None:
    memory = PinnedMemory(2)
    first = memory.allocate(300_000, torch.bfloat16).fill_(2)
    assert driver.pinned == {first.data_ptr(): 600_000}
    second = memory.allocate(300_000, torch.bfloat16).fill_(3)
    assert (first == 2).all(), "two tensors on one block"
    place, part = first.data_ptr(), first[5:9]
    del first
    third = memory.allocate(150_000, torch.float32)
    assert third.data_ptr() not in (place, second.data_ptr()), "the block is still in use by a view"
    assert part.tolist() == [2.0] * 4
    del part
    assert memory.allocate(150_000, torch.float32).data_ptr() == place
    assert memory.allocate(0, torch.float32).shape == (0,)


def test_the_number_of_idle_blocks_is_limited(driver: CudaDriver) -> None:
    memory = PinnedMemory(1)
    kept = [memory.allocate(1000 * (i + 1), torch.float32) for i in range(3)]
    assert sorted(driver.pinned.values()) == [4000, 8000, 12_000]
    kept.clear()
    assert len(driver.pinned) == 1
    del memory
    gc.collect()
    assert driver.pinned == {}


def test_a_block_larger_than_memory_is_a_memory_error(driver: CudaDriver) -> None:
    with pytest.raises(MemoryError, match="expected 4611686018427387904 bytes"):
        PinnedMemory(1).allocate(1 << 60, torch.float32)
    assert driver.pinned == {}


@pytest.mark.gpu
def test_a_gpu_copies_from_pinned_memory() -> None:
    memory = PinnedMemory(1)
    for size in (5_000_000, 5_000_000, 7_000_000):
        numbers = memory.allocate(size, torch.float32)
        assert numbers.is_pinned()
        numbers[:] = torch.arange(size)
        there = numbers.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert there[-1].item() == numbers[-1].item() == torch.arange(size)[-1].to(torch.float32).item()


@pytest.mark.gpu
def test_cuda_still_works_after_a_failed_pin() -> None:
    memory = PinnedMemory(1)
    with pytest.raises((MemoryError, RuntimeError)):
        memory.allocate(1 << 44, torch.float32)
    assert memory.allocate(10, torch.int32).fill_(7).cuda().tolist() == [7] * 10
