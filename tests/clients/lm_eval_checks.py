"""lm-eval: `local-completions` gives the results of its own `hf` model with PEFT, in float32 on the CPU."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lm_eval
import pytest

SERVER = os.environ["OPENAI_BASE_URL"]
MODEL = Path(os.environ["RANKLET_MODEL_DIR"])
ADAPTERS_DIR = Path(os.environ["RANKLET_ADAPTERS_DIR"])
BASE = "SmolLM2-135M-Instruct"
ADAPTERS = ("french", "ticket")
LARGEST_DIFFERENCE = 1e-3
QUESTIONS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "Madrid"], "answer": 0},
    {"question": "Two plus three equals", "choices": ["four", "five", "sixty-one"], "answer": 1},
    {"question": "Water freezes at zero degrees", "choices": ["Fahrenheit", "Celsius"], "answer": 1},
    {"question": "Bonjour, je m'appelle", "choices": ["Élodie \N{WAVING HAND SIGN}", "Łukasz"], "answer": 0},
]
TEXTS = [
    {"text": "The parcel was sent on Monday and arrived on Thursday, a day late.\nNobody complained."},
    {"text": "Ahoy! The tide be high, and the crew be ready to sail at dawn."},
]


def questions(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(QUESTIONS)}


def texts(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(TEXTS)}


CHOICES = {
    "task": "choices", "custom_dataset": questions, "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
PERPLEXITY = {
    "task": "perplexity", "custom_dataset": texts, "test_split": "test", "output_type": "loglikelihood_rolling",
    "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
}  # fmt: skip
WRITING = {
    "task": "writing", "custom_dataset": questions, "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {
        "until": ["\n", ".", "!", "?", ";"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0,
    },
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
TASKS = (CHOICES, PERPLEXITY, WRITING)


def answers(model: str, arguments: dict[str, Any], **options: Any) -> dict[str, list[Any]]:
    """Return the answers to each request of each task, in their order."""
    found: Any = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[dict(task) for task in TASKS], bootstrap_iters=0, **options
    )
    return {
        task: [answer for sample in samples for answer in sample["resps"]] for task, samples in found["samples"].items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, list[Any]]]:
    """Return the answers of transformers + PEFT by model name."""
    plain = {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu", "add_bos_token": False}
    adapted = {name: {**plain, "peft": str(ADAPTERS_DIR / name)} for name in ADAPTERS}
    found = {name: answers("hf", given, batch_size=1) for name, given in {BASE: plain, **adapted}.items()}
    first = sorted(logprob(each["choices"][0]) for each in found.values())
    assert all(after - before > 10 * LARGEST_DIFFERENCE for before, after in pairwise(first)), "models are too alike"
    return found


BATCHES, CONCURRENT = {"batch_size": 4}, {"batch_size": 1, "num_concurrent": 4}


@pytest.mark.parametrize(
    ("model", "options"),
    [*((model, BATCHES) for model in (BASE, *ADAPTERS)), ("french", CONCURRENT)],
)
def test_results_are_those_of_transformers_and_peft(
    expected: dict[str, dict[str, list[Any]]], model: str, options: dict[str, Any],
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """The client finds `/tokenizer_info` by itself, and tokenises over HTTP."""
    server = {"model": model, "base_url": f"{SERVER}/completions", "max_retries": 1, **options}
    found = answers("local-completions", server)
    scored = [
        [logprob(answer) for task in ("choices", "perplexity") for answer in each[task]]
        for each in (found, expected[model])
    ]
    assert len(scored[0]) == len(scored[1]) == sum(len(each["choices"]) for each in QUESTIONS) + len(TEXTS)
    difference = max(abs(got - wanted) for got, wanted in zip(*scored, strict=True))
    record_property("largest difference of a log-likelihood", difference)
    assert difference <= LARGEST_DIFFERENCE
    greedy = [[bool(answer[0][1]) for answer in each["choices"]] for each in (found, expected[model])]
    assert greedy[0] == greedy[1]
    assert found["writing"] == expected[model]["writing"]


def logprob(answer: Any) -> float:
    """Return the log-likelihood of an answer: [(number, is greedy)] or [number]."""
    value = answer[0]
    return float(value[0] if isinstance(value, tuple | list) else value)
