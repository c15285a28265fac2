"""Logprobs in the formats of OpenAI's API, read by its official client."""

import math

import orjson
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from ranklet.cluster.text.choice import TokenRecord
from ranklet.cluster.text.logprobs import LogprobsFormat
from tests.cluster.text.small_tokenizers import id_of, make
from tests.cluster.text.test_detokenizer import table

NAME = "byte_fallback"
A, B = (id_of(NAME, letter) for letter in "xo")
HALF = id_of(NAME, "<0x9F>")
FORMAT = LogprobsFormat(table(NAME))
RECORDS = [
    TokenRecord(A, 0),
    TokenRecord(A, 1, -0.5, ((A, -0.5), (HALF, -2.0))),
    TokenRecord(HALF, 2, -math.inf, ((B, -0.25), (A, -3.0))),
]


def test_completions() -> None:
    found = orjson.loads(orjson.dumps(FORMAT.completion(RECORDS)))
    assert found["tokens"] == ["x", "x", "bytes:\\x9f"]
    assert found["token_logprobs"] == [None, -0.5, -9999.0]
    assert found["text_offset"] == [0, 1, 2]
    # The client's types know no null, which only the first token of an echoed prompt has.
    read = Logprobs.model_validate(FORMAT.completion(RECORDS[1:]), strict=True)
    assert read.to_dict().keys() == found.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


def test_the_best_alternatives_of_completions_include_the_token_itself() -> None:
    assert FORMAT.completion(RECORDS)["top_logprobs"] == [
        None,
        {"x": -0.5, "bytes:\\x9f": -2.0},
        {"bytes:\\x9f": -9999.0, "o": -0.25, "x": -3.0},
    ]


def test_alternatives_with_equal_texts_keep_the_larger_logprob() -> None:
    fallback, plain = id_of(NAME, "<0x78>"), A  # both are "x"
    assert FORMAT.completion([TokenRecord(fallback, 0, -2.0, ((plain, -0.5),))])["top_logprobs"] == [{"x": -0.5}]
    assert FORMAT.completion([TokenRecord(plain, 0, -0.5, ((fallback, -2.0),))])["top_logprobs"] == [{"x": -0.5}]


def test_chats() -> None:
    found = ChoiceLogprobs.model_validate(orjson.loads(orjson.dumps(FORMAT.chat(RECORDS[1:]))))
    assert found.content is not None
    assert found.refusal is None
    first, second = found.content
    assert (first.token, first.logprob, first.bytes) == ("x", -0.5, [0x78])
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("x", -0.5, [0x78]),
        ("bytes:\\x9f", -2.0, [0x9F]),
    ]
    assert (second.logprob, second.bytes) == (-9999.0, [0x9F])
    assert [top.token for top in second.top_logprobs] == ["o", "x"]


def test_the_bytes_of_a_chat_make_its_text() -> None:
    ids = make(NAME).encode("x 😀你z").ids
    content = FORMAT.chat([TokenRecord(token, 0, -1.0) for token in ids])["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == " x 😀你z"


def test_tokens_as_ids() -> None:
    found = LogprobsFormat(table(NAME), as_ids=True)
    assert found.completion(RECORDS)["tokens"] == [f"token_id:{A}", f"token_id:{A}", f"token_id:{HALF}"]
    assert found.completion(RECORDS)["top_logprobs"][1] == {f"token_id:{A}": -0.5, f"token_id:{HALF}": -2.0}
    assert found.chat(RECORDS)["content"][2]["token"] == f"token_id:{HALF}"
    assert found.chat(RECORDS)["content"][2]["bytes"] == [0x9F]
