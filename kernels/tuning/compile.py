"""Compiles kernels in many processes, which share Triton's on-disk cache. One process compiles one kernel at a time."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

J = TypeVar("J")
_ATTEMPTS = 3  # a crash of the compiler ends its process, and with it the pool


def compile_all(launch: Callable[[J], object], jobs: Sequence[J], *, workers: int | None = None) -> Iterator[bool]:
    """Launch each job once in some process. Yields whether that worked, in the order of the jobs.

    Args:
        launch: starts a job's kernels on the GPU. Must be importable, as processes find it by name.
        workers: number of processes; one less than the machine's cores if not given. 0 launches nothing and yields
            True, for the interpreter, which compiles nothing.
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
    # Triton prints whole programs to the process's stderr for a launch that does not fit the GPU.
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
