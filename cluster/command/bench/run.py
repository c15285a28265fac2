"""A run from plan to numbers: asks the server what it has, starts the processes, gathers their logs."""

import contextlib
import dataclasses
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from ranklet.cluster.command.bench import worker
from ranklet.cluster.command.bench.client import ClientLog, ClientShare, starting_time
from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import PlannedRequest, make_requests
from ranklet.cluster.command.bench.result import BenchResult, summarize
from ranklet.cluster.command.bench.server import request_headers, resolve_models, warm_up

_OTHER_SEED = 1_000_003  # of the warm-up


def run_bench(plan: BenchPlan, progress: Callable[[int, int], None] = lambda done, of: None) -> BenchResult:
    """Run a plan. Interrupted (Ctrl-C), it gives the numbers of what was answered.

    Args:
        progress: called several times a second with the requests answered so far, and all.

    Raises:
        ValueError: the server cannot be reached or does not answer the warm-up with vectors, an adapter's pattern
            matches none, or the dataset cannot be used.
    """
    base, adapters = resolve_models(plan)
    asked = make_requests(plan, base, adapters)
    warm_up(plan, _warming(plan, base, asked))
    processes = min(plan.processes, len(asked), plan.max_concurrency or len(asked))
    shares = [
        ClientShare(
            plan.url, request_headers(plan), asked[i::processes], _concurrency(plan, processes, i), plan.timeout_s
        )
        for i in range(processes)
    ]
    open_loop = math.isfinite(plan.request_rate) and plan.max_concurrency is None
    return summarize(_run(shares, len(asked), progress), len(asked), open_loop=open_loop)


def _warming(plan: BenchPlan, base: str, asked: list[PlannedRequest]) -> list[PlannedRequest]:
    """Requests to all that the run asks, in turn, with prompts of their own: a server may keep answers or prefixes."""
    if not plan.warmup:
        return []
    prompts = plan.warmup * plan.batch_size
    other = dataclasses.replace(
        plan, num_prompts=prompts, seed=plan.seed + _OTHER_SEED, adapter_distribution="distinct"
    )
    return make_requests(other, base, [name for name in dict.fromkeys(one.model for one in asked) if name != base])


def _concurrency(plan: BenchPlan, processes: int, index: int) -> int | None:
    if plan.max_concurrency is None:
        return None
    return plan.max_concurrency // processes + (index < plan.max_concurrency % processes)


def _run(shares: list[ClientShare], total: int, progress: Callable[[int, int], None]) -> list[ClientLog]:
    with contextlib.ExitStack() as stack:
        pipes = [_started(stack) for _ in shares]
        for pipe, share in zip(pipes, shares, strict=True):
            _sent(pipe, share)
        for pipe in pipes:
            _received(pipe)
        begin_s = starting_time()
        with _stopped_by_ctrl_c(pipes):
            for pipe in pipes:
                _sent(pipe, begin_s)
            return _gathered(pipes, total, progress)


def _gathered(pipes: list[Connection], total: int, progress: Callable[[int, int], None]) -> list[ClientLog]:
    done, logs = dict.fromkeys(pipes, 0), dict[Connection, ClientLog]()
    while len(logs) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in logs]):
            assert isinstance(pipe, Connection)
            said = _received(pipe)
            if isinstance(said, ClientLog):
                logs[pipe] = said
            done[pipe] = len(said.records) if isinstance(said, ClientLog) else said
        progress(sum(done.values()), total)
    return list(logs.values())


@contextlib.contextmanager
def _stopped_by_ctrl_c(pipes: list[Connection]) -> Iterator[None]:
    """The first Ctrl-C asks the processes for what they have, and tears no message; the next one raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for pipe in pipes:
            with contextlib.suppress(OSError):  # it has ended by itself
                pipe.send("stop")

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever runs us decided otherwise
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _sent(pipe: Connection, message: Any) -> None:
    with contextlib.suppress(ConnectionError):  # what it has to say is read next: that it is gone
        pipe.send(message)


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise ValueError("a process of the load client ended early; what it said is above") from None


def _started(stack: contextlib.ExitStack) -> Connection:
    """A process of its own program: multiprocessing's would import the caller's main module, torch and all.

    In a session of its own, so that the terminal's Ctrl-C reaches only us.
    """
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", worker.__name__, str(theirs.fileno())]
        stack.enter_context(subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True))
    return stack.enter_context(ours)
