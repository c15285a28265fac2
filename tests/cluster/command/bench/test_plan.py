"""A plan refuses fields out of range, with the flag, the expected value and the actual one."""

import math
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.cluster.command.cli import main


@pytest.mark.parametrize(
    ("fields", "flag", "got"),
    [
        ({"input_len": 0}, "--input-len", "got 0"),
        ({"vocab": 0}, "--vocab-size", "got 0"),
        ({"num_prompts": -1}, "--num-prompts", "got -1"),
        ({"batch_size": 0}, "--batch-size", "got 0"),
        ({"processes": 0}, "--processes", "got 0"),
        ({"warmup": -1}, "--warmup", "got -1"),
        ({"seed": -1}, "--seed", "got -1"),
        ({"timeout_s": 0.0}, "--timeout-s", "got 0"),
        ({"range_ratio": 0.0}, "--range-ratio", "got 0"),
        ({"range_ratio": 1.5}, "--range-ratio", "got 1.5"),
        ({"range_ratio": math.nan}, "--range-ratio", "got nan"),
        ({"request_rate": 0.0}, "--request-rate", "got 0"),
        ({"request_rate": math.nan}, "--request-rate", "got nan"),
        ({"max_concurrency": 0}, "--max-concurrency", "got 0"),
        ({"dataset": "sharegpt"}, "--dataset", "got 'sharegpt'"),
        ({"dataset": "file"}, "--dataset", "--path"),
        ({"path": Path("a")}, "--dataset", "--path"),
        ({"adapter_as": "lora"}, "--adapter-as", "got 'lora'"),
        ({"encoding_format": "hex"}, "--encoding-format", "got 'hex'"),
        ({"adapter_distribution": "zipf:-1"}, "--adapter-distribution", "zipf:-1"),
        ({"adapter_distribution": "normal"}, "--adapter-distribution", "'normal'"),
        ({"base_url": "localhost:8000"}, "--base-url", "localhost:8000"),
        ({"length_distribution": "normal"}, "--length-distribution", "'normal'"),
        ({"length_distribution": "lognormal:0", "range_ratio": 0.5}, "--length-distribution", "'lognormal:0'"),
        ({"length_distribution": "lognormal:x", "range_ratio": 0.5}, "--length-distribution", "'lognormal:x'"),
        ({"length_distribution": "lognormal:1"}, "--length-distribution", "got 1.0"),
        ({"text": TextPlan(), "batch_size": 2}, "--batch-size", "got 2"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, Any], flag: str, got: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        BenchPlan(**fields)
    assert str(error.value).startswith(flag)
    assert got in str(error.value)


@pytest.mark.parametrize(
    ("fields", "flag", "got"),
    [
        ({"output_len": 0}, "--output-len", "got 0"),
        ({"output_range_ratio": 0.0}, "--output-range-ratio", "got 0"),
        ({"output_range_ratio": math.nan}, "--output-range-ratio", "got nan"),
        ({"common_prompt_tokens": -1}, "--common-prompt-tokens", "got -1"),
        ({"temperature": -0.5}, "--temperature", "got -0.5"),
        ({"temperature": math.inf}, "--temperature", "got inf"),
        ({"continuous_usage": True, "stream": False}, "--continuous-usage", "--no-stream"),
    ],
)
def test_a_field_of_text_out_of_range_is_refused(fields: dict[str, Any], flag: str, got: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        TextPlan(**fields)
    assert str(error.value).startswith(flag)
    assert got in str(error.value)


def test_the_task_decides_the_path() -> None:
    base = "http://h:1"
    assert BenchPlan(base_url=base).url == "http://h:1/v1/embeddings"
    assert BenchPlan(base_url=base, text=TextPlan()).url == "http://h:1/v1/completions"
    assert BenchPlan(base_url=base, text=TextPlan(chat=True)).url == "http://h:1/v1/chat/completions"
    assert BenchPlan(base_url=base, text=TextPlan(), endpoint="/x").url == "http://h:1/x"


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(BenchPlan(api_key="secret"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--input-len", "0"], ["--out", "no/such/folder/a.json"], ["--plot", "a.txt"], ["--ignore-eos"],
        ["--no-stream"], ["--task", "text", "--output-len", "0"],
    ],
)  # fmt: skip
def test_the_command_refuses_before_it_sends(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--base-url", "http://127.0.0.1:9", *flags]) == 1
    output = capsys.readouterr().err
    assert "expected" in output
    assert flags[-1].split("/")[0] in output
