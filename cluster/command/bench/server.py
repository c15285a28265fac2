"""What a server says of itself before any load: its models, its version, and whether it answers at all.

Asked without the environment's proxies, as the load is: a proxy must not be what is measured.
"""

import asyncio
import fnmatch
import json
import urllib.request
from typing import Any

import aiohttp

from ranklet.cluster.command.bench.answer import OK, check_answer
from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import PlannedRequest

_PATTERN = frozenset("*?[")
_PATIENCE_S = 30.0


def request_headers(plan: BenchPlan) -> dict[str, str]:
    """Of every request."""
    key = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    return {"content-type": "application/json", **key}


def resolve_models(plan: BenchPlan) -> tuple[str, list[str]]:
    """The base's name, and those of the adapters to ask.

    Raises:
        ValueError: a pattern matches no adapter of the server, or a name is wanted of a server that lists none.
    """
    patterns = [name for name in plan.adapters if _PATTERN & set(name)]
    if plan.model and not patterns:
        return plan.model, list(dict.fromkeys(plan.adapters))
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
        chosen += found
    return plan.model or bases[0], list(dict.fromkeys(chosen))


def fetch_version(plan: BenchPlan) -> Any:
    """What /version answers; None of a server that has none."""
    try:
        return _get(plan, "/version")
    except (OSError, ValueError):
        return None


def _models(plan: BenchPlan) -> list[dict[str, Any]]:
    try:
        cards: list[dict[str, Any]] = _get(plan, "/v1/models")["data"]
        if all(isinstance(card["id"], str) for card in cards):
            return cards
        raise ValueError("a model without a name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = plan.base_url.rstrip("/") + "/v1/models"
        raise ValueError(f"expected a list of models at {where}, got {type(error).__name__}: {error}") from None


def _get(plan: BenchPlan, path: str) -> Any:
    request = urllib.request.Request(plan.base_url.rstrip("/") + path, headers=request_headers(plan))
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_PATIENCE_S) as answer:
        return json.load(answer)


def warm_up(plan: BenchPlan, asked: list[PlannedRequest]) -> None:
    """Send these one after the other.

    Raises:
        ValueError: the server cannot be reached, refuses, or answers with something else than vectors.
    """
    if asked:
        asyncio.run(_warm_up(plan, asked))


async def _warm_up(plan: BenchPlan, asked: list[PlannedRequest]) -> None:
    timeout = aiohttp.ClientTimeout(total=plan.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=request_headers(plan)) as session:
        for one in asked:
            try:
                async with session.post(plan.url, data=one.body) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ValueError(f"expected a server at {plan.url}, got {type(error).__name__}: {error}") from None
            if check_answer(answer.status, raw, one.prompts, check_values=True)[0] != OK:
                said = raw[:500].decode(errors="replace")
                raise ValueError(
                    f"expected {one.prompts} finite vectors of a warm-up request to {one.model}, got {answer.status}: "
                    f"{said}. --warmup 0 measures all the same"
                )
