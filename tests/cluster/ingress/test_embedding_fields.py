"""Fields of embeddings requests: which are honoured, refused by name, accepted without effect, or ignored and named."""

from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.ingress.embeddings import EmbeddingsRequest
from ranklet.cluster.ingress.known_fields import EMBEDDING_FIELDS
from tests.cluster.ingress.parts import BASE, MAX_MODEL_LEN, Parts

WORDS = "one two three four five six seven eight"


async def ask(parts: Parts, given: Any, **fields: Any) -> Any:
    return await parts.http.post("/v1/embeddings", json={"model": BASE, "input": given, **fields})


def lengths(parts: Parts) -> list[int]:
    return [len(prompt) for prompt in parts.handle.calls[-1].prompts()]


@pytest.mark.parametrize(
    ("given", "tokens", "expected"),
    [
        (WORDS, 3, [3]),
        ([WORDS, "one"], 3, [3, 1]),
        (WORDS, 100, [8]),
        (WORDS, None, [8]),
        ("word " * 20_000, -1, [MAX_MODEL_LEN]),
        ([list(range(10)), [1]], 3, [3, 1]),
        ([1] * 20_000, -1, [MAX_MODEL_LEN]),
    ],
)
async def test_inputs_are_truncated_as_the_request_wants(
    tmp_path: Path, given: Any, tokens: int | None, expected: list[int]
) -> None:
    parts = Parts(tmp_path)
    answer = await ask(parts, given, truncate_prompt_tokens=tokens)
    assert answer.status_code == 200, answer.text
    assert lengths(parts) == expected
    assert answer.json()["usage"]["prompt_tokens"] == sum(expected)
    assert "x-ranklet-ignored" not in answer.headers


@pytest.mark.parametrize(("side", "kept"), [(None, [1, 2, 3]), ("right", [1, 2, 3]), ("left", [3, 4, 5])])
async def test_token_ids_are_truncated_on_the_side_that_the_request_names(
    tmp_path: Path, side: str | None, kept: list[int]
) -> None:
    parts = Parts(tmp_path)
    assert (await ask(parts, [1, 2, 3, 4, 5], truncate_prompt_tokens=3, truncation_side=side)).status_code == 200
    assert parts.handle.calls[-1].prompts()[0].tolist() == kept


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", MAX_MODEL_LEN + 1),
        ("truncate_prompt_tokens", "3"),
        ("truncation_side", "middle"),
        ("add_special_tokens", 1),
        ("prompt_name", "document"),
        ("prompt_name", 1),
        ("task", "query"),
        ("embed_dtype", "float16"),
        ("endianness", "big"),
        ("output_dtype", "int8"),
        ("embedding_types", ["float", "int8"]),
        ("encoding", "utf-8"),
        ("output_dimension", 32),
        ("truncate", True),
        ("truncate", "END"),
        ("task", "retrieval.query"),
        ("late_chunking", True),
        ("messages", [{"role": "user", "content": "a"}]),
        ("adapter_id", "legal"),
        ("lora_request", {"lora_name": "legal"}),
        ("extra_body", {"dimensions": 2}),
        ("encoding_format", "bytes"),
    ],
)
async def test_a_field_that_would_change_the_vector_is_refused_by_name(tmp_path: Path, param: str, value: Any) -> None:
    parts = Parts(tmp_path)
    answer = await ask(parts, WORDS, **{param: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(f"{param}: ")
    assert parts.handle.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "a", "priority": 5, "input_type": "query", "request_id": "r", "truncation_side": "left"},
        {"normalize": True, "use_activation": True, "add_special_tokens": True, "embed_dtype": "float32"},
        {"endianness": "little", "truncate": False, "prompt_name": None, "task": ""},
    ],
)
async def test_fields_without_effect_are_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    parts = Parts(tmp_path)
    answer = await ask(parts, WORDS, **fields)
    assert answer.status_code == 200, answer.text
    assert "x-ranklet-ignored" not in answer.headers


async def test_unknown_fields_are_named_in_a_header(tmp_path: Path) -> None:
    answer = await ask(Parts(tmp_path), WORDS, mystery=1, other=[])
    assert answer.headers["x-ranklet-ignored"] == "mystery,other"


@pytest.mark.parametrize(
    ("fields", "normalize"),
    [
        ({}, None),
        ({"normalize": True}, True),
        ({"normalize": False}, False),
        ({"use_activation": False}, False),
        ({"normalize": False, "use_activation": False}, False),
    ],
)
async def test_a_request_says_whether_its_vectors_are_normalised(
    tmp_path: Path, fields: dict[str, Any], normalize: bool | None
) -> None:
    parts = Parts(tmp_path)
    assert (await ask(parts, WORDS, **fields)).status_code == 200
    assert parts.handle.calls[-1].params.normalize is normalize


async def test_normalize_and_its_newer_name_must_agree(tmp_path: Path) -> None:
    answer = await ask(Parts(tmp_path), WORDS, normalize=True, use_activation=False)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_activation")


async def test_an_unknown_token_id_is_refused_with_the_setting_of_clients(tmp_path: Path) -> None:
    for given in ([1, 2000], [[1], [2000]], [2**40]):
        error = (await ask(Parts(tmp_path), given)).json()["error"]
        assert error["param"] == "input"
        assert "check_embedding_ctx_length" in error["message"]


def test_no_field_is_both_honoured_and_refused() -> None:
    honoured = set(EmbeddingsRequest.model_fields)
    assert not honoured & set(EMBEDDING_FIELDS.refused)
    assert not set(EMBEDDING_FIELDS.refused) & set(EMBEDDING_FIELDS.accepted)
