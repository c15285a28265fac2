"""Requests to a server outside the measurement: its models, its version, and the warm-up.

Neither these requests nor the load use the environment's proxies, so the measurement contains no proxy.
"""

import asyncio
import contextlib
from typing import Any

import aiohttp

from ranklet.cluster.command.bench.answer import OK, check_answer
from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import PlannedRequest
from ranklet.cluster.command.bench.text_client import TextLoadClient
from ranklet.cluster.command.json_client import fetch_json
from ranklet.cluster.names import matches

_PATTERN = frozenset("*?")
_TIMEOUT_S = 30.0


def request_headers(plan: BenchPlan) -> dict[str, str]:
    key = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    return {"content-type": "application/json", **key}


def resolve_models(plan: BenchPlan) -> tuple[str, list[str]]:
    """Return the name of the base model and the names of the adapters to use.

    Raises:
        ValueError: A pattern matches no adapter of the server, or neither the plan nor the server names a base model.
    """
    patterns = [name for name in plan.adapters if _PATTERN & set(name)]
    if plan.model and not patterns:
        return plan.model, list(dict.fromkeys(plan.adapters))
    cards = _models(plan)
    bases = [card["id"] for card in cards if not card.get("parent")]
    if not plan.model and not bases:
        raise ValueError(f"--model: {plan.base_url}/v1/models lists no base model; name it with --model")
    known = [card["id"] for card in cards if card.get("parent")]
    chosen: list[str] = []
    for name in plan.adapters:
        found = [each for each in known if matches(name, [each])] if name in patterns else [name]
        if not found:
            raise ValueError(f"--adapters: {name!r} matches none of the server's {len(known)} adapters")
        chosen += found
    return plan.model or bases[0], list(dict.fromkeys(chosen))


def fetch_vocabulary(plan: BenchPlan) -> int | None:
    """Return the number of the base model's token ids; None if /v1/models does not say it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        bases = [card for card in _models(plan) if not card.get("parent")]
        sizes = [card["ranklet"]["vocab_size"] for card in bases if plan.model in (None, card["id"])]
        return int(sizes[0]) if sizes else None
    return None


def fetch_version(plan: BenchPlan) -> Any:
    """Return the server's answer to /version; None if it has none."""
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
    return fetch_json(plan.base_url.rstrip("/") + path, timeout_s=_TIMEOUT_S, token=plan.api_key)


def warm_up(plan: BenchPlan, requests: list[PlannedRequest]) -> None:
    """Send requests one after the other.

    Raises:
        ValueError: The server cannot be reached, refuses a request, or answers without vectors or text.
    """
    if requests:
        asyncio.run(_warm_up_text(plan, requests) if plan.text else _warm_up_embeddings(plan, requests))


async def _warm_up_text(plan: BenchPlan, requests: list[PlannedRequest]) -> None:
    assert plan.text is not None
    client = TextLoadClient(plan.url, request_headers(plan), plan.timeout_s, streamed=plan.text.stream)
    with contextlib.closing(client):
        for request in requests:
            reply = await client.send(request.body)
            if reply.outcome != OK:
                text = reply.detail[:500].decode(errors="replace")
                raise ValueError(
                    f"expected a text from a warm-up request for {request.model} to {plan.url}, "
                    f"got {reply.outcome}: {text}. --warmup 0 skips this check"
                )


async def _warm_up_embeddings(plan: BenchPlan, requests: list[PlannedRequest]) -> None:
    timeout = aiohttp.ClientTimeout(total=plan.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=request_headers(plan)) as session:
        for request in requests:
            try:
                async with session.post(plan.url, data=request.body) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ValueError(f"expected a server at {plan.url}, got {type(error).__name__}: {error}") from None
            if check_answer(answer.status, raw, request.prompts, check_values=True)[0] != OK:
                text = raw[:500].decode(errors="replace")
                raise ValueError(
                    f"expected {request.prompts} finite vectors from a warm-up request to {request.model}, "
                    f"got {answer.status}: {text}. --vocab-size bounds the token ids, --warmup 0 skips this check"
                )
