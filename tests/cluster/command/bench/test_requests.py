"""The requests of a plan: lengths, times, whom they ask, files; all by the seed."""

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


def bodies(asked: list[PlannedRequest]) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in asked]


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
    asked = make_requests(dataclasses.replace(PLAN, range_ratio=1.0), "base", [])
    assert {len(body["input"]) for body in bodies(asked)} == {100}


def test_the_seed_decides_everything() -> None:
    plan = dataclasses.replace(PLAN, request_rate=20.0)
    assert make_requests(plan, "base", ADAPTERS) == make_requests(plan, "base", ADAPTERS)
    other = make_requests(dataclasses.replace(plan, seed=1), "base", ADAPTERS)
    for one, another in zip(make_requests(plan, "base", ADAPTERS)[:20], other, strict=False):
        assert (one.body, one.at_s) != (another.body, another.at_s)


def test_arrivals_are_poisson() -> None:
    asked = make_requests(dataclasses.replace(PLAN, num_prompts=5000, input_len=4, request_rate=50.0), "base", [])
    gaps = np.diff([0.0, *(one.at_s for one in asked)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # an exponential's deviation is its mean


def test_without_a_rate_all_leave_at_once() -> None:
    assert {one.at_s for one in make_requests(PLAN, "base", [])} == {0.0}


@pytest.mark.parametrize("field", ["model", "lora_path"])
def test_the_adapter_travels_in_the_field_asked_for(field: str) -> None:
    asked = make_requests(
        dataclasses.replace(PLAN, adapter_as=field, adapter_distribution="distinct"), "base", ADAPTERS
    )
    said = bodies(asked)
    assert [body[field] for body in said] == [one.model for one in asked] == [ADAPTERS[i % 3] for i in range(400)]
    assert field == "model" or {body["model"] for body in said} == {"base"}


def test_mixes_of_adapters() -> None:
    def counts(mix: str) -> Counter[str]:
        asked = make_requests(dataclasses.replace(PLAN, adapter_distribution=mix, input_len=4), "base", ADAPTERS)
        return Counter(one.model for one in asked)

    assert counts("identical") == {"a": 400}
    assert min(counts("uniform").values()) > 100
    skewed = counts("zipf:2")
    assert skewed["a"] > 2.5 * skewed["b"] > 2.5 * skewed["c"]


def test_batches_hold_all_prompts_and_the_last_is_short() -> None:
    asked = make_requests(dataclasses.replace(PLAN, num_prompts=10, batch_size=4), "base", [])
    assert [one.prompts for one in asked] == [4, 4, 2]
    assert [len(body["input"]) for body in bodies(asked)] == [4, 4, 2]


def test_random_text_is_words() -> None:
    said = bodies(make_requests(dataclasses.replace(PLAN, as_text=True, range_ratio=1.0), "base", []))
    assert {len(body["input"].split()) for body in said} == {50}
    assert len({body["input"] for body in said}) == 400


def test_a_file_of_lines_is_repeated_until_there_are_enough(tmp_path: Path) -> None:
    plan = file_plan(tmp_path, "one\n\n two\x85b \u2028 \nthree\n")
    assert [body["input"] for body in bodies(make_requests(plan, "base", []))] == ["one", "two\x85b", "three", "one"]


def test_a_file_of_json_lines_may_name_models(tmp_path: Path) -> None:
    lines = [{"text": "x"}, {"input": "y", "model": "b"}, {"input": [1, 2]}, {"text": "z", "model": "base"}]
    plan = file_plan(tmp_path, "\n".join(map(json.dumps, lines)), adapter_as="lora_path", adapters=("a",))
    asked = make_requests(plan, "base", ["a"])
    assert [one.model for one in asked] == ["a", "b", "a", "base"]
    assert [body.get("lora_path") for body in bodies(asked)] == ["a", "b", "a", None]
    assert [body["input"] for body in bodies(asked)] == ["x", "y", [1, 2], "z"]
    with pytest.raises(ValueError, match="--batch-size: expected 1"):
        make_requests(dataclasses.replace(plan, batch_size=2), "base", ["a"])


@pytest.mark.parametrize(
    ("content", "said"),
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
def test_a_bad_file_is_refused_by_line(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"--path: .*{said}"):
        make_requests(file_plan(tmp_path, content), "base", [])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--path: expected a readable"):
        make_requests(BenchPlan(dataset="file", path=tmp_path / "none"), "base", [])
