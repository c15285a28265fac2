"""The requests of a plan: lengths, send times, models and dataset files, all determined by the seed."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import PlannedRequest, make_requests

PLAN = BenchPlan(num_prompts=400, input_len=100, range_ratio=0.25, vocab=50, processes=1)
ADAPTERS = ["a", "b", "c"]


def bodies(requests: list[PlannedRequest]) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in requests]


def file_plan(folder: Path, content: str, **fields: Any) -> BenchPlan:
    path = folder / "texts"
    path.write_text(content, encoding="utf-8")
    return BenchPlan(dataset="file", path=path, processes=1, **{"num_prompts": 4, **fields})


def test_lengths_are_uniform_in_the_range_and_ids_are_of_the_vocabulary() -> None:
    inputs = [body["input"] for body in bodies(make_requests(PLAN, "base", []))]
    lengths = [len(ids) for ids in inputs]
    assert (min(lengths), max(lengths)) == (25, 100)
    assert np.mean(lengths) == pytest.approx(62.5, abs=4)
    assert {token for ids in inputs for token in ids} == set(range(50))


def test_ratio_one_gives_one_length() -> None:
    requests = make_requests(dataclasses.replace(PLAN, range_ratio=1.0), "base", [])
    assert {len(body["input"]) for body in bodies(requests)} == {100}


def test_the_seed_determines_all_requests() -> None:
    plan = dataclasses.replace(PLAN, request_rate=20.0)
    assert make_requests(plan, "base", ADAPTERS) == make_requests(plan, "base", ADAPTERS)
    other = make_requests(dataclasses.replace(plan, seed=1), "base", ADAPTERS)
    for one, another in zip(make_requests(plan, "base", ADAPTERS)[:20], other, strict=False):
        assert (one.body, one.at_s) != (another.body, another.at_s)


def test_lognormal_lengths_have_the_lengths_as_medians_and_are_cut_off() -> None:
    plan = dataclasses.replace(PLAN, length_distribution="lognormal:0.8", num_prompts=4000)
    lengths = [len(body["input"]) for body in bodies(make_requests(plan, "base", []))]
    assert (min(lengths), max(lengths)) == (25, 400)
    assert np.median(lengths) == pytest.approx(100, rel=0.08)
    within = [length for length in lengths if 25 < length < 400]
    assert np.std(np.log(within)) == pytest.approx(0.68, abs=0.06)  # of a normal cut off at 1.73 deviations


def test_arrivals_are_poisson() -> None:
    requests = make_requests(dataclasses.replace(PLAN, num_prompts=5000, input_len=4, request_rate=50.0), "base", [])
    gaps = np.diff([0.0, *(one.at_s for one in requests)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # an exponential's deviation is its mean


def test_without_a_rate_all_requests_are_sent_at_once() -> None:
    assert {one.at_s for one in make_requests(PLAN, "base", [])} == {0.0}


@pytest.mark.parametrize("field", ["model", "lora_path"])
def test_the_adapter_is_in_the_chosen_field(field: str) -> None:
    requests = make_requests(
        dataclasses.replace(PLAN, adapter_as=field, adapter_distribution="distinct"), "base", ADAPTERS
    )
    sent = bodies(requests)
    assert [body[field] for body in sent] == [one.model for one in requests] == [ADAPTERS[i % 3] for i in range(400)]
    assert field == "model" or {body["model"] for body in sent} == {"base"}


def test_adapter_distributions() -> None:
    def counts(mix: str) -> Counter[str]:
        requests = make_requests(dataclasses.replace(PLAN, adapter_distribution=mix, input_len=4), "base", ADAPTERS)
        return Counter(one.model for one in requests)

    assert counts("identical") == {"a": 400}
    assert min(counts("uniform").values()) > 100
    skewed = counts("zipf:2")
    assert skewed["a"] > 2.5 * skewed["b"] > 2.5 * skewed["c"]


def test_batches_contain_all_prompts_and_the_last_is_short() -> None:
    requests = make_requests(dataclasses.replace(PLAN, num_prompts=10, batch_size=4), "base", [])
    assert [one.prompts for one in requests] == [4, 4, 2]
    assert [len(body["input"]) for body in bodies(requests)] == [4, 4, 2]


def test_random_text_consists_of_words() -> None:
    sent = bodies(make_requests(dataclasses.replace(PLAN, as_text=True, range_ratio=1.0), "base", []))
    assert {len(body["input"].split()) for body in sent} == {50}
    assert len({body["input"] for body in sent}) == 400


def test_a_file_with_too_few_lines_is_repeated(tmp_path: Path) -> None:
    plan = file_plan(tmp_path, "one\n\n two\x85b \u2028 \nthree\n")
    assert [body["input"] for body in bodies(make_requests(plan, "base", []))] == ["one", "two\x85b", "three", "one"]


def test_json_lines_may_name_models(tmp_path: Path) -> None:
    lines = [{"text": "x"}, {"input": "y", "model": "b"}, {"input": [1, 2]}, {"text": "z", "model": "base"}]
    plan = file_plan(tmp_path, "\n".join(map(json.dumps, lines)), adapter_as="lora_path", adapters=("a",))
    requests = make_requests(plan, "base", ["a"])
    assert [one.model for one in requests] == ["a", "b", "a", "base"]
    assert [body.get("lora_path") for body in bodies(requests)] == ["a", "b", "a", None]
    assert [body["input"] for body in bodies(requests)] == ["x", "y", [1, 2], "z"]
    with pytest.raises(ValueError, match="--batch-size: expected 1"):
        make_requests(dataclasses.replace(plan, batch_size=2), "base", ["a"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "at least one text"),
        ("\n \n", "at least one text"),
        ('{"text": "a"}\n{"txt": "b"}', "line 2"),
        ('{"text": "a"}\n\n{"text": ', "line 3"),
        ('{"text": 5}', "line 1"),
        ('{"input": [1, "a"]}', "line 1"),
        ('{"input": "a", "model": 5}', "line 1"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"--path: .*{expected}"):
        make_requests(file_plan(tmp_path, content), "base", [])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--path: expected a readable"):
        make_requests(BenchPlan(dataset="file", path=tmp_path / "none"), "base", [])
