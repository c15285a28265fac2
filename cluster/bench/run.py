"""A run from plan to numbers: asks the server what it has, starts the processes, gathers their logs."""

import asyncio
import contextlib
import fnmatch
import json
import math
import multiprocessing
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from ranklet.cluster.bench.client import Log, Share, first_answer, starting_time, work
from ranklet.cluster.bench.outcome import Outcome, outcome
from ranklet.cluster.bench.plan import Plan
from ranklet.cluster.bench.requests import draw

_POLL_S = 0.1
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
    asyncio.run(first_answer(plan.url, headers, asked[: max(1, plan.warmup)], plan.timeout_s))
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
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads' locks
    done = spawn.Array("q", len(shares), lock=False)
    pipes = [spawn.Pipe() for _ in shares]
    workers = [
        spawn.Process(target=work, args=(share, theirs, done, i), daemon=True)
        for i, (share, (_, theirs)) in enumerate(zip(shares, pipes, strict=True))
    ]
    for worker in workers:
        worker.start()
    ours = [pipe for pipe, _ in pipes]
    for pipe in ours:
        pipe.recv()
    begin_s = starting_time()
    for pipe in ours:
        pipe.send(begin_s)
    with contextlib.suppress(KeyboardInterrupt):  # the processes got it too, and send what they have
        while not all(pipe.poll(_POLL_S) for pipe in ours):
            progress(sum(done), total)
    logs: list[Log] = [pipe.recv() for pipe in ours]
    progress(sum(done), total)
    for worker in workers:
        worker.join()
    return logs


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
