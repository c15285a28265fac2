"""A run from plan to numbers: asks the server what it has, starts the processes, gathers their logs."""

import asyncio
import contextlib
import fnmatch
import json
import math
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from ranklet.cluster.bench import worker
from ranklet.cluster.bench.client import Log, Share, first_answer, starting_time
from ranklet.cluster.bench.outcome import Outcome, outcome
from ranklet.cluster.bench.plan import Plan
from ranklet.cluster.bench.requests import draw

_PATTERN = frozenset("*?[")


def bench(plan: Plan, progress: Callable[[int, int], None] = lambda done, of: None) -> Outcome:
    """Run a plan. Interrupted (Ctrl-C), it gives the numbers of what was answered.

    Args:
        progress: called several times a second with the requests answered so far, and all.

    Raises:
        ValueError: the server cannot be reached or does not answer the first request with vectors, an adapter's pattern
            matches none, or the dataset cannot be used.
    """
    base, adapters = targets(plan)
    asked = draw(plan, base, adapters)
    headers = {"content-type": "application/json"}
    if plan.api_key:
        headers["authorization"] = f"Bearer {plan.api_key}"
    asyncio.run(first_answer(plan.url, headers, asked[: plan.warmup], plan.timeout_s))
    processes = min(plan.processes, len(asked))
    open_loop = math.isfinite(plan.request_rate) and plan.max_concurrency is None
    shares = [
        Share(plan.url, headers, asked[i::processes], _concurrency(plan, processes, i), plan.timeout_s, open_loop)
        for i in range(processes)
    ]
    return outcome(_run(shares, len(asked), progress), adapters or [base], open_loop=open_loop)


def _concurrency(plan: Plan, processes: int, index: int) -> int | None:
    if plan.max_concurrency is None:
        return None
    return plan.max_concurrency // processes + (index < plan.max_concurrency % processes)


def _run(shares: list[Share], total: int, progress: Callable[[int, int], None]) -> list[Log]:
    with contextlib.ExitStack() as stack:
        ours = [stack.enter_context(_started(share, stack)) for share in shares]
        for pipe in ours:
            _received(pipe)
        begin_s = starting_time()
        for pipe in ours:
            pipe.send(begin_s)
        done, logs = dict.fromkeys(ours, 0), dict[Connection, Log]()
        while len(logs) < len(ours):
            with contextlib.suppress(KeyboardInterrupt):  # the processes got it too, and send what they have
                wait([pipe for pipe in ours if pipe not in logs])
                for pipe in ours:
                    if pipe in logs or not pipe.poll():
                        continue
                    said = _received(pipe)
                    if isinstance(said, Log):
                        logs[pipe] = said
                    done[pipe] = len(said.records) if isinstance(said, Log) else said
                progress(sum(done.values()), total)
        return list(logs.values())


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise ValueError("a process of the load client ended early; what it said is above") from None


def _started(share: Share, stack: contextlib.ExitStack) -> Connection:
    """A process of its own program: multiprocessing's would import the caller's main module, torch and all."""
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", worker.__name__, str(theirs.fileno())]
        stack.enter_context(subprocess.Popen(command, pass_fds=(theirs.fileno(),)))
    ours.send(share)
    return ours


def targets(plan: Plan) -> tuple[str, list[str]]:
    """The base's name, and those of the adapters to ask.

    Raises:
        ValueError: a pattern matches no adapter of the server, or a name is wanted of a server that lists none.
    """
    patterns = [name for name in plan.adapters if _PATTERN & set(name)]
    if plan.model and not patterns:
        return plan.model, list(plan.adapters)
    cards = _models(plan)
    bases = [card["id"] for card in cards if not card.get("parent")]
    if not plan.model and not bases:
        raise ValueError(f"--model: expected {plan.base_url}/v1/models to name a base model, got none; give its name")
    known = [card["id"] for card in cards if card.get("parent")]
    chosen: list[str] = []
    for name in plan.adapters:
        found = fnmatch.filter(known, name) if name in patterns else [name]
        if not found:
            raise ValueError(f"--adapters: {name!r} matches none of the server's {len(known)} adapters")
        chosen += [one for one in found if one not in chosen]
    return plan.model or bases[0], chosen


def _models(plan: Plan) -> list[dict[str, Any]]:
    url = plan.base_url.rstrip("/") + "/v1/models"
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return list(json.load(answer)["data"])
    except (OSError, ValueError, KeyError, urllib.error.URLError) as error:
        raise ValueError(f"expected a list of models at {url}, got {type(error).__name__}: {error}") from None
