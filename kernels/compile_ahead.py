"""Compiles many kernels at once, before they are launched one after the other.

Triton compiles most of a kernel without Python's lock, so threads suffice.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

_MOST_THREADS = 16  # more wait for Python's lock
_listing = Lock()

logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """A kernel in one specialization."""

    function: Any
    specialization: str


@contextmanager
def listed_kernels() -> Iterator[dict[Kernel, None]]:
    """List kernels that this thread launches and that are not compiled yet, instead of compiling and launching them.

    Other kernels run, so the memory that they read has any contents if a listed kernel should have written it.
    """
    found: dict[Kernel, None] = {}
    thread = get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if get_ident() == thread:
            found[Kernel(fn.jit_function, compile["specialization_data"])] = None
        return get_ident() == thread  # whether to omit the compilation and the launch

    with _listing:
        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
        try:
            yield found
        finally:
            knobs.runtime.jit_cache_hook = before


def compile_kernels(kernels: Sequence[Kernel], device: torch.device, *, threads: int | None = None) -> int:
    """Compile and load kernels, from Triton's on-disk cache if they are there. Returns how many failed.

    A failure is not an error: the kernel's launch compiles it again, and says what is wrong. Only this thread loads
    kernels. Triton 3.6 loads each launcher as a module of the same name, and Python writes into the module loaded
    before if a file is loaded again. If threads did that, a kernel would get the launcher of another.

    Args:
        threads: by default one for each core.
    """
    threads = min(threads or len(os.sched_getaffinity(0)), _MOST_THREADS)
    for function in dict.fromkeys(kernel.function for kernel in kernels):
        function.cache_key  # noqa: B018 - computes a hash that all its variants share
    with ThreadPoolExecutor(threads, thread_name_prefix="ranklet-compile") as pool:
        compiled = list(pool.map(partial(_compile, device), kernels))
    return [each is not None and _load(device, each) for each in compiled].count(False)


def _compile(device: torch.device, kernel: Kernel) -> Any:
    """Compile a kernel, and its launcher into the cache on disk. Returns None if it fails."""
    try:
        with torch.cuda.device(device):
            compiled = kernel.function.preload(kernel.specialization)
            with suppress(Exception):  # `_load` makes it again
                triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
            return compiled
    except Exception:  # Triton raises many types
        logger.debug("%s could not be compiled ahead", kernel.function, exc_info=True)
        return None


def _load(device: torch.device, compiled: Any) -> bool:
    try:
        with torch.cuda.device(device):
            compiled.run  # noqa: B018 - loads it
    except Exception:
        logger.debug("a kernel could not be loaded ahead", exc_info=True)
        return False
    return True
