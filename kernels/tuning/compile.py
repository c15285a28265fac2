"""Compiles kernels in many processes, which share Triton's on-disk cache. One process compiles one kernel at a time."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

J = TypeVar("J")
_ATTEMPTS = 3  # of a job: a crash of the compiler ends the pool, and another job may have caused it


def compile_all(launch: Callable[[J], object], jobs: Sequence[J], *, workers: int | None = None) -> Iterator[bool]:
    """Launch each job once in a worker process. Yields whether each job worked, in the order of the jobs.

    Args:
        launch: launches a job's kernels. Must be importable, because worker processes find it by name.
        workers: number of processes, by default one less than the machine's cores. With 0, nothing is launched and
            all jobs count as working, for the interpreter, which compiles nothing.
    """
    workers = max(1, len(os.sched_getaffinity(0)) - 1) if workers is None else workers
    if workers == 0:
        yield from (True for _ in jobs)
        return
    left, attempts = list(jobs), 0
    while left:
        done = 0
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_mute) as pool:
            try:
                futures: list[Future[bool]] = [pool.submit(_attempt, launch, job) for job in left]
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
        left, attempts = left[done:], 1 if done else attempts + 1
        if left and attempts == _ATTEMPTS:
            yield False
            left, attempts = left[1:], 0


def _mute() -> None:
    # Triton prints whole programs to stderr for a launch that does not fit the GPU.
    with open(os.devnull, "w") as devnull:  # noqa: PTH123 - a descriptor is needed, not a path
        os.dup2(devnull.fileno(), 2)


def _attempt(launch: Callable[[J], object], job: J) -> bool:
    try:
        launch(job)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # Triton raises many types if a launch does not fit the GPU
        return False
    return True
