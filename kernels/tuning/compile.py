"""Triton compiles one kernel at a time: here many processes do, each filling the on-disk cache that all share."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

J = TypeVar("J")
_ATTEMPTS = 3  # a compiler that crashes takes its process, and with it the pool, along


def compile_all(launch: Callable[[J], object], jobs: Sequence[J], *, workers: int | None = None) -> Iterator[bool]:
    """Launch each job once in some process, and say in order of the jobs whether that worked.

    Args:
        launch: a module's function that starts the job's kernels on the GPU; processes find it by its name.
        workers: processes; the machine's cores less one if not given. 0 says True without launching anything, for
            the interpreter, which compiles nothing.
    """
    workers = max(1, len(os.sched_getaffinity(0)) - 1) if workers is None else workers
    if workers == 0:
        yield from (True for _ in jobs)
        return
    left = list(jobs)
    for _ in range(_ATTEMPTS):
        done = 0
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_mute) as pool:
            try:
                futures: list[Future[bool]] = [pool.submit(_attempt, launch, job) for job in left]
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
        left = left[done:]
        if not left:
            return
    yield from (False for _ in left)


def _mute() -> None:
    """Triton prints whole programs to stderr, past Python's, for a launch that does not fit the GPU."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a descriptor is needed, not a path
        os.dup2(nowhere.fileno(), 2)


def _attempt(launch: Callable[[J], object], job: J) -> bool:
    try:
        launch(job)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # whatever the reason, the job is not for this GPU
        return False
    return True
