"""Requests for text: fields, lengths of outputs and common prompts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import make_requests
from ranklet.cluster.command.bench.text_plan import TextPlan

PLAN = BenchPlan(num_prompts=200, input_len=20, vocab=50, processes=1, text=TextPlan())


def bodies(plan: BenchPlan, **fields: Any) -> list[dict[str, Any]]:
    assert plan.text is not None
    text = dataclasses.replace(plan.text, **fields)
    return [json.loads(one.body) for one in make_requests(dataclasses.replace(plan, text=text), "base", ["a", "b"])]


def test_a_completion_asks_only_for_what_the_plan_sets() -> None:
    body = bodies(PLAN)[0]
    assert len(body.pop("prompt")) == 20
    assert body.pop("model") in {"a", "b"}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert body == {"max_tokens": 128, "temperature": 0.0, **streamed}
    assert bodies(PLAN, ignore_eos=True)[0]["ignore_eos"] is True
    assert bodies(PLAN, continuous_usage=True)[0]["stream_options"]["continuous_usage_stats"] is True
    assert "stream_options" not in bodies(PLAN, stream=False)[0]


def test_a_chat_asks_with_words() -> None:
    body = bodies(PLAN, chat=True, output_len=7)[0]
    (message,) = body["messages"]
    assert (message["role"], len(message["content"].split())) == ("user", 10)
    assert body["max_completion_tokens"] == 7
    assert not {"prompt", "max_tokens"} & body.keys()


def test_sampled_requests_have_seeds_of_their_own() -> None:
    assert [body["seed"] for body in bodies(PLAN, temperature=0.7)] == list(range(200))
    assert bodies(dataclasses.replace(PLAN, seed=5), temperature=0.7)[3]["seed"] == 8


def test_lengths_of_outputs_are_drawn_apart_from_prompts() -> None:
    found = bodies(PLAN, output_len=100, output_range_ratio=0.5)
    lengths = [body["max_tokens"] for body in found]
    assert min(lengths) < 55 < 95 < max(lengths)
    assert [body["prompt"] for body in found] == [body["prompt"] for body in bodies(PLAN)]
    skewed = bodies(
        dataclasses.replace(PLAN, text=TextPlan(output_range_ratio=0.1), length_distribution="lognormal:0.5")
    )
    assert np.median([body["max_tokens"] for body in skewed]) == pytest.approx(128, rel=0.2)
    assert {len(body["prompt"]) for body in skewed} == {20}


@pytest.mark.parametrize("chat", [False, True])
def test_common_prompts_come_before_and_differ_between_seeds(chat: bool) -> None:
    def prompts(**fields: Any) -> list[Any]:
        found = bodies(dataclasses.replace(PLAN, **fields), common_prompt_tokens=30, chat=chat)
        return [body["messages"][0]["content"].split() if chat else body["prompt"] for body in found]

    common, own = (15, 10) if chat else (30, 20)
    found = prompts()
    assert {len(prompt) for prompt in found} == {common + own}
    assert len({tuple(prompt[:common]) for prompt in found}) == 1
    assert len({tuple(prompt[common:]) for prompt in found}) == 200
    assert prompts(seed=1)[0][:common] != found[0][:common]


def test_common_prompts_of_files(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text('{"text": "x"}\n{"input": [1, 2]}\n')
    plan = dataclasses.replace(PLAN, dataset="file", path=path, num_prompts=2)
    text, ids = (body["prompt"] for body in bodies(plan, common_prompt_tokens=6))
    assert (len(text.split()), text.split()[-1]) == (4, "x")
    assert (len(ids), ids[-2:]) == (8, [1, 2])
    with pytest.raises(ValueError, match="--chat: expected a file of texts, got token ids"):
        bodies(plan, chat=True)
