"""Gives memory back to the system after large requests. glibc keeps what is freed, in each thread's arena."""

import ctypes
from collections.abc import Callable

_M_MMAP_THRESHOLD = -3  # mallopt's name of the option
_MAPPED_BYTES = 1 << 20  # glibc raises the threshold up to 32 MB, as soon as a block of such a size is freed


def map_large_blocks() -> None:
    """Let each block of 1 MB and more return to the system as soon as it is freed."""
    if (mallopt := _of_libc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def give_back_memory() -> None:
    """Return free memory to the system. Blocks for some milliseconds, without the GIL."""
    if (malloc_trim := _of_libc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)  # not in every C library
    return function
