"""The requests of a plan: model, body and send time of each. The seed determines all of them."""

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.kernels.mixes import assign

_WORDS = 4096  # distinct random words
_TOKENS_PER_WORD = 2  # roughly, with common tokenizers


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, ready to send."""

    at_s: float  # after the start
    model: str  # the base model or an adapter
    prompts: int
    body: bytes


class PromptLine(NamedTuple):
    """One prompt: a text, or token ids."""

    content: str | list[int] | NDArray[np.int32]
    model: str | None = None  # as named in the dataset's file


def make_requests(plan: BenchPlan, base: str, adapters: list[str]) -> list[PlannedRequest]:
    """Return all requests of a run, in send order.

    Raises:
        ValueError: The dataset's file cannot be used.
    """
    prompts = _prompts(plan)
    count = math.ceil(len(prompts) / plan.batch_size)
    models = [base] * count
    if adapters:
        models = [adapters[i] for i in assign(plan.adapter_distribution, count, len(adapters), seed=plan.seed)]
    requests = []
    for i, at_s in enumerate(_send_times(plan, count)):
        chunk = prompts[i * plan.batch_size : (i + 1) * plan.batch_size]
        model = chunk[0].model or models[i]
        requests.append(PlannedRequest(at_s, model, len(chunk), _body(plan, base, model, chunk)))
    return requests


def _send_times(plan: BenchPlan, count: int) -> list[float]:
    if not math.isfinite(plan.request_rate):
        return [0.0] * count
    gaps = np.random.default_rng(plan.seed + 1).exponential(1 / plan.request_rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def _body(plan: BenchPlan, base: str, model: str, chunk: list[PromptLine]) -> bytes:
    body: dict[str, Any] = {"model": base, "encoding_format": plan.encoding_format}
    if model != base:
        body[plan.adapter_as] = model
    body["input"] = [prompt.content for prompt in chunk] if plan.batch_size > 1 else chunk[0].content
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _prompts(plan: BenchPlan) -> list[PromptLine]:
    if plan.dataset == "file":
        lines = _read_file(plan)
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
    return [PromptLine(" ".join(rng.choice(words, max(1, length // _TOKENS_PER_WORD)))) for length in lengths]


def _read_file(plan: BenchPlan) -> list[PromptLine]:
    assert plan.path is not None
    try:
        # str.splitlines would also split at characters that texts and JSON may contain
        lines = [line.strip() for line in plan.path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--path: expected a readable UTF-8 file: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise ValueError(f"--path: expected at least one text, {plan.path} has none")
    if numbered[0][1].startswith("{"):
        return [_parse_entry(number, line) for number, line in numbered]
    return [PromptLine(line) for _, line in numbered]


def _parse_entry(number: int, line: str) -> PromptLine:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    fields = entry if isinstance(entry, dict) else {}
    content: Any = fields.get("text") or fields.get("input")
    model = fields.get("model")
    is_ids = isinstance(content, list) and content and all(type(token) is int for token in content)
    if not (isinstance(content, str) or is_ids) or not (model is None or isinstance(model, str)):
        raise ValueError(
            f"--path: line {number}: expected a JSON object with a text or token ids in `text` or `input`, "
            f"and optionally a name in `model`; got {line[:60]}"
        )
    return PromptLine(content, model)
