"""Pinned host memory in blocks of exactly the requested size.

torch rounds pinned blocks up to powers of two, so an adapter of 81 MB would take 134 MB of the host cache's budget.
Pinning a new block takes the driver 52 ms on an H200's host, so blocks are used again.
"""

import mmap
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

Allocate = Callable[[int, torch.dtype], Tensor]  # makes an uninitialised tensor [count]


def pageable(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype)


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the host from which a copy to `device` does not wait.

    For a GPU it is a pinned copy, whose memory torch uses again only after the copies from it, unless the tensor is
    pinned already.
    """
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    np.copyto(pinned.numpy(), tensor.numpy())  # torch would wake other threads for it
    return pinned


class PinnedMemory:
    """Allocates pinned tensors; a block is used again after the last tensor on it is freed. Thread-safe.

    It takes no lock: the garbage collector may return a block in a thread that holds the lock already.

    Args:
        max_idle: number of unused blocks that are kept; the oldest are freed first.
    """

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: deque[_Block] = deque()

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """Allocate an uninitialised tensor [count].

        Raises:
            MemoryError, RuntimeError: there is not enough memory, or the driver cannot pin it.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        block = self._block(count * dtype.itemsize)
        whole = np.frombuffer(block, dtype=np.uint8)  # lives as long as any view of the tensor
        finalize(whole, self._return, block).atexit = False
        return torch.from_numpy(whole).view(dtype)

    def _block(self, nbytes: int) -> "_Block":
        for block in tuple(self._idle):
            if len(block) == nbytes:
                with suppress(ValueError):  # another thread took it
                    self._idle.remove(block)
                    return block
        return _Block.pinned(nbytes)

    def _return(self, block: "_Block") -> None:
        self._idle.append(block)
        if len(self._idle) > self._max_idle:
            with suppress(IndexError):
                self._idle.popleft()


class _Block(mmap.mmap):
    """Private pages that are unpinned before they are unmapped."""

    _pinned_at = 0

    @classmethod
    def pinned(cls, nbytes: int) -> "_Block":
        try:
            block = cls(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"host memory: expected {nbytes} bytes, got: {error}") from error
        with suppress(OSError):  # the kernel has no huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(block, dtype=np.uint8).ctypes.data
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        except RuntimeError:
            with suppress(RuntimeError):
                torch.ones(1, device="cuda")  # CUDA reports the error again at the next launch, so make one here
            raise
        block._pinned_at = address
        return block

    def __del__(self) -> None:
        if self._pinned_at and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
