"""Host memory that a GPU copies from without another copy, in blocks of just the size that is asked for.

torch's own comes in powers of two, so that adapters of 81 MB would hold 134 each beside a budget that knows of 81, and
every new one takes the driver 52 ms on an H200's host.
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

Allocate = Callable[[int, torch.dtype], Tensor]  # room for so many numbers


def pageable(count: int, dtype: torch.dtype) -> Tensor:
    """Ordinary memory, uninitialised."""
    return torch.empty(count, dtype=dtype)


class PinnedMemory:
    """Blocks that come back when the last tensor on them is gone, and are kept for others of their size. Thread-safe.

    Without a lock: a block can come back wherever Python collects garbage, in a thread that would hold it too.

    Args:
        most_idle: blocks that are kept unused; the oldest goes first.
    """

    def __init__(self, most_idle: int) -> None:
        self._most_idle = most_idle
        self._idle: deque[_Block] = deque()

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for `count` numbers, uninitialised.

        Raises:
            MemoryError, RuntimeError: there is not so much, or the driver cannot pin it.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        block = self._block(count * dtype.itemsize)
        whole = np.frombuffer(block, dtype=np.uint8)  # lives as long as any view of the tensor
        finalize(whole, self._take_back, block).atexit = False
        return torch.from_numpy(whole).view(dtype)

    def _block(self, nbytes: int) -> "_Block":
        for block in tuple(self._idle):
            if len(block) == nbytes:
                with suppress(ValueError):  # somebody else was faster
                    self._idle.remove(block)
                    return block
        return _Block.pinned(nbytes)

    def _take_back(self, block: "_Block") -> None:
        self._idle.append(block)
        if len(self._idle) > self._most_idle:
            with suppress(IndexError):
                self._idle.popleft()


class _Block(mmap.mmap):
    """Private pages, which the driver must let go of before they are unmapped."""

    _pinned_at = 0

    @classmethod
    def pinned(cls, nbytes: int) -> "_Block":
        try:
            block = cls(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"host memory: expected {nbytes} bytes, got: {error}") from error
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(block, dtype=np.uint8).ctypes.data
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        except RuntimeError:
            with suppress(RuntimeError):
                torch.ones(1, device="cuda")  # CUDA tells a thread of its error again at the next launch: at this one
            raise
        block._pinned_at = address
        return block

    def __del__(self) -> None:
        if self._pinned_at and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
