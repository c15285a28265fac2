"""One run: queries the server's models, starts the client processes, and collects their logs."""

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
from ranklet.cluster.command.bench.client import ClientLog, ClientShare, choose_start_time
from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import PlannedRequest, make_requests
from ranklet.cluster.command.bench.result import BenchResult, summarize
from ranklet.cluster.command.bench.server import request_headers, resolve_models, warm_up

_WARM_UP_SEED = 1_000_003  # added to the plan's seed


def run_bench(plan: BenchPlan, progress: Callable[[int, int], None] = lambda done, total: None) -> BenchResult:
    """Run a plan. After Ctrl-C, returns the numbers of the requests answered so far.

    Args:
        progress: Called several times per second with the number of answered requests and of all requests.

    Raises:
        ValueError: The server cannot be reached or does not answer the warm-up as asked, a pattern matches no
            adapter, or the dataset cannot be used.
    """
    base, adapters = resolve_models(plan)
    requests = make_requests(plan, base, adapters)
    warm_up(plan, _warm_up_requests(plan, base, requests))
    processes = min(plan.processes, len(requests), plan.max_concurrency or len(requests))
    shares = [
        ClientShare(
            plan.url,
            request_headers(plan),
            requests[i::processes],
            _concurrency(plan, processes, i),
            plan.timeout_s,
            text=plan.text is not None,
            streamed=plan.text is not None and plan.text.stream,
        )
        for i in range(processes)
    ]
    open_loop = math.isfinite(plan.request_rate) and plan.max_concurrency is None
    return summarize(_run_shares(shares, len(requests), progress), len(requests), open_loop=open_loop)


def _warm_up_requests(plan: BenchPlan, base: str, requests: list[PlannedRequest]) -> list[PlannedRequest]:
    """Return requests to each model of the run. Their prompts differ from the run's, which a server may cache."""
    if not plan.warmup:
        return []
    prompts = plan.warmup * plan.batch_size
    other = dataclasses.replace(
        plan, num_prompts=prompts, seed=plan.seed + _WARM_UP_SEED, adapter_distribution="distinct"
    )
    return make_requests(
        other, base, [name for name in dict.fromkeys(request.model for request in requests) if name != base]
    )


def _concurrency(plan: BenchPlan, processes: int, index: int) -> int | None:
    if plan.max_concurrency is None:
        return None
    return plan.max_concurrency // processes + (index < plan.max_concurrency % processes)


def _run_shares(shares: list[ClientShare], total: int, progress: Callable[[int, int], None]) -> list[ClientLog]:
    with contextlib.ExitStack() as stack:
        pipes = [_start_process(stack) for _ in shares]
        for pipe, share in zip(pipes, shares, strict=True):
            _send(pipe, share)
        for pipe in pipes:
            _receive(pipe)
        start_s = choose_start_time()
        for pipe in pipes:
            _send(pipe, start_s)
        with _stopped_by_ctrl_c(pipes):  # a process would read an earlier stop message as the start time
            return _collect(pipes, total, progress)


def _collect(pipes: list[Connection], total: int, progress: Callable[[int, int], None]) -> list[ClientLog]:
    done, logs = dict.fromkeys(pipes, 0), dict[Connection, ClientLog]()
    while len(logs) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in logs]):
            assert isinstance(pipe, Connection)
            message = _receive(pipe)
            if isinstance(message, ClientLog):
                logs[pipe] = message
            done[pipe] = len(message.records) if isinstance(message, ClientLog) else message
        progress(sum(done.values()), total)
    return list(logs.values())


@contextlib.contextmanager
def _stopped_by_ctrl_c(pipes: list[Connection]) -> Iterator[None]:
    """Stop the processes at the first Ctrl-C, and keep their logs. A second Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for pipe in pipes:
            with contextlib.suppress(OSError):  # the process has ended
                pipe.send("stop")

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # the caller handles Ctrl-C in another way
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _send(pipe: Connection, message: Any) -> None:
    with contextlib.suppress(ConnectionError):  # the next receive reports that the process has ended
        pipe.send(message)


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise ValueError("a process of the load client ended early; its output is above") from None


def _start_process(stack: contextlib.ExitStack) -> Connection:
    """Start a client process and return the pipe to it.

    It is not a process of multiprocessing, which would import the caller's main module, with torch. It has its own
    session, so that the terminal's Ctrl-C reaches only the parent.
    """
    parent_end, child_end = Pipe()
    with child_end:
        command = [sys.executable, "-m", worker.__name__, str(child_end.fileno())]
        stack.enter_context(subprocess.Popen(command, pass_fds=(child_end.fileno(),), start_new_session=True))
    return stack.enter_context(parent_end)
