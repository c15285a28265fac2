"""The requests of a plan: whom each asks, what it says, when it leaves. The same for the same seed."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ranklet.cluster.bench.plan import Plan
from ranklet.kernels.mixes import assign

_WORDS = 4096  # different random words
_TOKENS_A_WORD = 2  # of a common tokenizer, about


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, ready to send."""

    at_s: float  # after the start
    label: int  # whom it asks: index into the run's labels
    prompts: int
    body: bytes


def draw(plan: Plan, base: str, adapters: list[str]) -> list[Asked]:
    """All requests of a run, in the order they leave.

    Raises:
        ValueError: the dataset's file cannot be used; the message says why.
    """
    prompts = _prompts(plan)
    requests = math.ceil(len(prompts) / plan.batch_size)
    rng = np.random.default_rng(plan.seed + 1)
    gaps = rng.exponential(1 / plan.request_rate, requests) if math.isfinite(plan.request_rate) else np.zeros(requests)
    labels = assign(plan.adapter_distribution, requests, len(adapters), seed=plan.seed) if adapters else [0] * requests
    asked = []
    for i, at_s in enumerate(np.cumsum(gaps)):
        chunk = prompts[i * plan.batch_size : (i + 1) * plan.batch_size]
        body: dict[str, Any] = {"model": base, "encoding_format": plan.encoding_format}
        if adapters:
            body[plan.adapter_as] = adapters[labels[i]]
        body["input"] = chunk if plan.batch_size > 1 else chunk[0]
        packed = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        asked.append(Asked(float(at_s), labels[i], len(chunk), packed))
    return asked


def _prompts(plan: Plan) -> list[str] | list[NDArray[np.int32]]:
    if plan.dataset == "file":
        texts = _read(plan)
        return [texts[i % len(texts)] for i in range(plan.num_prompts)]
    rng = np.random.default_rng(plan.seed)
    shortest = max(1, round(plan.input_len * plan.range_ratio))
    lengths = rng.integers(shortest, plan.input_len, plan.num_prompts, endpoint=True).tolist()
    if not plan.as_text:
        return [rng.integers(0, plan.vocab, length, dtype=np.int32) for length in lengths]
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(_WORDS)])
    return [" ".join(rng.choice(words, max(1, length // _TOKENS_A_WORD))) for length in lengths]


def _read(plan: Plan) -> list[str]:
    assert plan.path is not None
    try:
        lines = [line for line in plan.path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--path: expected a readable UTF-8 file: {error}") from None
    if not lines:
        raise ValueError(f"--path: expected at least one text, {plan.path} has none")
    return [_text(line, number) for number, line in enumerate(lines, 1)] if lines[0].startswith("{") else lines


def _text(line: str, number: int) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    found = (entry.get("text") or entry.get("input")) if isinstance(entry, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"--path: line {number}: expected a JSON object with a text in `text` or `input`")
    return found
