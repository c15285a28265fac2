"""Answers of several servers and the outcome code of each."""

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from ranklet.cluster.command.bench.answer import check_answer


def coded(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


def answer(*vectors: Any, **fields: Any) -> bytes:
    data = [{"embedding": vector} for vector in vectors]
    return orjson.dumps({"data": data, "usage": {"prompt_tokens": 9}} | fields)


@pytest.mark.parametrize("check_values", [False, True])
@pytest.mark.parametrize("vector", [coded(1, 2), [1.0, 2.0]])
def test_vectors_in_both_encodings(vector: Any, check_values: bool) -> None:
    assert check_answer(200, answer(vector, vector), 2, check_values=check_values) == ("ok", 9)


def test_a_server_may_count_no_tokens() -> None:
    assert check_answer(200, answer([1.0], usage=None), 1) == ("ok", 0)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"<html>", b"[]", b"null", b"{}", answer(), answer([1.0], [1.0]), answer([1.0], data=None),
        answer([1.0], usage={"prompt_tokens": "many"}),
    ],
)  # fmt: skip
def test_a_malformed_answer_is_bad(raw: bytes) -> None:
    assert check_answer(200, raw, 1) == ("bad_answer", 0)


@pytest.mark.parametrize("vector", [coded(1, float("nan")), coded(float("inf")), "", "!", "AAA=", [], [1.0, None], 5])
def test_checking_values_finds_invalid_vectors(vector: Any) -> None:
    assert check_answer(200, answer(vector), 1, check_values=True) == ("bad_answer", 0)


@pytest.mark.parametrize(
    ("status", "content", "code"),
    [
        (
            404,
            {"error": {"message": "no", "type": "t", "code": "model_not_found"}},
            "model_not_found",
        ),  # OpenAI, ranklet
        (404, {"error": {"message": "no", "type": "NotFoundError", "code": 404}}, "404"),  # vLLM
        (400, {"object": "error", "message": "no", "type": "Bad", "code": 400}, "400"),  # SGLang
        (400, {"error": {"message": "no", "type": "Bad", "code": None}}, "Bad"),
        (413, {"error": "too long", "error_type": "Validation"}, "413"),  # TEI
        (422, {"detail": [{"msg": "no"}]}, "422"),  # FastAPI
        (500, [1], "500"),
        (502, None, "502"),
    ],
)
def test_error_codes_of_several_servers(status: int, content: Any, code: str) -> None:
    assert check_answer(status, orjson.dumps(content), 1) == (code, 0)


def test_an_error_in_plain_text() -> None:
    assert check_answer(503, b"upstream connect error", 1) == ("503", 0)
