"""The requests of a plan: whom each asks, what it says, when it leaves. The same for the same seed."""

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.kernels.mixes import assign

_WORDS = 4096  # different random words
_TOKENS_A_WORD = 2  # of a common tokenizer, about


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, ready to send."""

    at_s: float  # after the start
    model: str  # whom it asks: the base, or an adapter
    prompts: int
    body: bytes


class PromptLine(NamedTuple):
    """One text, or its token ids."""

    said: str | list[int] | NDArray[np.int32]
    model: str | None = None  # whom the dataset's file wants to ask


def make_requests(plan: BenchPlan, base: str, adapters: list[str]) -> list[PlannedRequest]:
    """All requests of a run, in the order they leave.

    Raises:
        ValueError: the dataset's file cannot be used; the message says why.
    """
    prompts = _prompts(plan)
    requests = math.ceil(len(prompts) / plan.batch_size)
    rng = np.random.default_rng(plan.seed + 1)
    gaps = rng.exponential(1 / plan.request_rate, requests) if math.isfinite(plan.request_rate) else np.zeros(requests)
    whom = [0] * requests
    if adapters:
        whom = assign(plan.adapter_distribution, requests, len(adapters), seed=plan.seed)
    asked = []
    for i, at_s in enumerate(np.cumsum(gaps).tolist()):
        chunk = prompts[i * plan.batch_size : (i + 1) * plan.batch_size]
        model = chunk[0].model or (adapters[whom[i]] if adapters else base)
        body: dict[str, Any] = {"model": base, "encoding_format": plan.encoding_format}
        if model != base:
            body[plan.adapter_as] = model
        body["input"] = [prompt.said for prompt in chunk] if plan.batch_size > 1 else chunk[0].said
        asked.append(PlannedRequest(at_s, model, len(chunk), orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)))
    return asked


def _prompts(plan: BenchPlan) -> list[PromptLine]:
    if plan.dataset == "file":
        lines = _read(plan)
        if plan.batch_size > 1 and any(line.model for line in lines):
            raise ValueError(f"--batch-size: expected 1 for a file whose lines name models, got {plan.batch_size}")
        return [lines[i % len(lines)] for i in range(plan.num_prompts)]
    rng = np.random.default_rng(plan.seed)
    shortest = max(1, int(plan.input_len * plan.range_ratio))
    lengths = rng.integers(shortest, plan.input_len, plan.num_prompts, endpoint=True).tolist()
    if not plan.as_text:
        return [PromptLine(rng.integers(0, plan.vocab, length, dtype=np.int32)) for length in lengths]
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(_WORDS)])
    return [PromptLine(" ".join(rng.choice(words, max(1, length // _TOKENS_A_WORD)))) for length in lengths]


def _read(plan: BenchPlan) -> list[PromptLine]:
    assert plan.path is not None
    try:
        # not str.splitlines, which also cuts at characters that texts and JSON may hold
        lines = [line.strip() for line in plan.path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--path: expected a readable UTF-8 file: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise ValueError(f"--path: expected at least one text, {plan.path} has none")
    if numbered[0][1].startswith("{"):
        return [_entry(number, line) for number, line in numbered]
    return [PromptLine(line) for _, line in numbered]


def _entry(number: int, line: str) -> PromptLine:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    fields = entry if isinstance(entry, dict) else {}
    said: Any = fields.get("text") or fields.get("input")
    model = fields.get("model")
    is_ids = isinstance(said, list) and said and all(type(token) is int for token in said)
    if not (isinstance(said, str) or is_ids) or not (model is None or isinstance(model, str)):
        raise ValueError(
            f"--path: line {number}: expected a JSON object with a text or token ids in `text` or `input`, "
            f"and perhaps a name in `model`; got {line[:60]}"
        )
    return PromptLine(said, model)
