"""The requests of a plan: model, body and send time of each. The seed determines all of them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.prompts import PromptLine, draw_lengths, make_prompts
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.kernels.mixes import assign

_OUTPUT_SEED = 3  # added to the plan's seed for the lengths of outputs


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, ready to send."""

    at_s: float  # after the start
    model: str  # the base model or an adapter
    prompts: int
    body: bytes


def make_requests(plan: BenchPlan, base: str, adapters: list[str]) -> list[PlannedRequest]:
    """Return all requests of a run, in send order.

    Raises:
        ValueError: The dataset's file cannot be used.
    """
    prompts = make_prompts(plan)
    count = math.ceil(len(prompts) / plan.batch_size)
    models = [base] * count
    if adapters:
        models = [adapters[i] for i in assign(plan.adapter_distribution, count, len(adapters), seed=plan.seed)]
    outputs = _output_lengths(plan, count)
    requests = []
    for i, at_s in enumerate(_send_times(plan, count)):
        chunk = prompts[i * plan.batch_size : (i + 1) * plan.batch_size]
        model = chunk[0].model or models[i]
        requests.append(PlannedRequest(at_s, model, len(chunk), _body(plan, base, model, chunk, outputs[i], i)))
    return requests


def _send_times(plan: BenchPlan, count: int) -> list[float]:
    if not math.isfinite(plan.request_rate):
        return [0.0] * count
    gaps = np.random.default_rng(plan.seed + 1).exponential(1 / plan.request_rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def _output_lengths(plan: BenchPlan, count: int) -> list[int]:
    if plan.text is None:
        return [0] * count
    rng = np.random.default_rng(plan.seed + _OUTPUT_SEED)
    return draw_lengths(plan, rng, plan.text.output_len, plan.text.output_range_ratio, count)


def _body(plan: BenchPlan, base: str, model: str, chunk: list[PromptLine], output_tokens: int, index: int) -> bytes:
    body: dict[str, Any] = {"model": base}
    if model != base:
        body[plan.adapter_as] = model
    if plan.text:
        body |= _text_fields(plan.text, chunk[0], output_tokens, plan.seed + index)
    else:
        body["encoding_format"] = plan.encoding_format
        body["input"] = [prompt.content for prompt in chunk] if plan.batch_size > 1 else chunk[0].content
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _text_fields(text: TextPlan, prompt: PromptLine, output_tokens: int, seed: int) -> dict[str, Any]:
    """Return the fields that all servers know, and the others only if the plan sets them."""
    fields: dict[str, Any] = {"temperature": text.temperature, "stream": text.stream}
    if text.chat:
        fields["messages"] = [{"role": "user", "content": prompt.content}]
        fields["max_completion_tokens"] = output_tokens
    else:
        fields["prompt"] = prompt.content
        fields["max_tokens"] = output_tokens
    if text.stream:
        fields["stream_options"] = {"include_usage": True}
        if text.continuous_usage:
            fields["stream_options"]["continuous_usage_stats"] = True
    if text.ignore_eos:
        fields["ignore_eos"] = True
    if text.temperature > 0:
        fields["seed"] = seed
    return fields
