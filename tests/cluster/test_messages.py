"""Messages between processes survive pickling; inputs are checked, and answers and refusals are rendered."""

import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from ranklet.cluster import message
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import join_embeddings, render_embeddings
from ranklet.cluster.ingress.body import BodyTooLarge
from ranklet.cluster.ingress.embeddings import EmbeddingsTask
from ranklet.cluster.ingress.protocol import parse_input
from ranklet.cluster.ingress.refusals import body_of, refuse
from ranklet.cluster.message import EmbedResult, InferenceReply, Refusal, pack, split
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import (
    AdapterNotFound,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Saturated,
    Unavailable,
    UnknownModel,
)
from ranklet.routing.report import QueueLoad

LOAD = QueueLoad(1, 0, 0.0, 0, 0)
TOKEN_LISTS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(TOKEN_LISTS)
def test_a_call_survives_pickling(prompts: list[list[int]]) -> None:
    adapter = AdapterLocation("a", "/a", "r1")
    call = pickle.loads(pickle.dumps(pack(adapter, parse_input(prompts, 100), EmbedParams(64), "g")))  # type: ignore[arg-type]
    assert [prompt.tolist() for prompt in call.prompts()] == prompts
    assert (call.adapter, call.adapter_name, call.params) == (adapter, "a", EmbedParams(64))


@given(TOKEN_LISTS, st.integers(4, 400), st.integers(1, 6))
def test_split_keeps_order_and_limits(prompts: list[list[int]], vector_bytes: int, most: int) -> None:
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "MAX_MESSAGE_BYTES", 200)
        patch.setattr(message, "MAX_MESSAGE_PROMPTS", most)
        parts = list(split(arrays, vector_bytes))
    assert [prompt.tolist() for part in parts for prompt in part] == prompts
    assert all(1 <= len(part) <= most for part in parts)
    assert all(len(part) == 1 or 4 * sum(map(len, part)) <= 200 for part in parts)
    assert all(len(part) == 1 or vector_bytes * len(part) <= 200 for part in parts)


def refusal(parse: Callable[[], Any]) -> InvalidRequest | None:
    """The InvalidRequest that `parse` raises; None if it raises nothing."""
    try:
        parse()
    except InvalidRequest as error:
        return error
    return None


@given(JSON)
def test_any_input_is_accepted_or_refused_with_the_fields_name(value: Any) -> None:
    error = refusal(lambda: parse_input(value, 10))
    if error is not None:
        assert error.param == "input"
        assert len(error.message) < 300


@given(st.binary() | JSON.filter(lambda value: _fits(value)).map(orjson.dumps))
def test_any_body_is_accepted_or_refused_with_the_fields_name(body: bytes) -> None:
    error = refusal(lambda: EmbeddingsTask.parse(cast(Any, None), body))
    assert error is None or error.param


def _fits(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits
        return False
    return True


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("m", param="input"), 400),
        (UnknownModel("m", param="model"), 404),
        (AdapterNotFound("m", param="model"), 404),
        (InvalidAdapter("a", ["one", "two"]), 400),
        (Saturated("m", retry_after_s=2.5), 503),
        (Unavailable("m"), 503),
        (InternalError("m"), 500),
    ],
)
def test_a_refusal_gives_back_the_error_that_it_was_made_of(error: RankletError, status: int) -> None:
    sent = pickle.loads(pickle.dumps(Refusal.of(error, "replica", "a", None)))
    came = sent.error()
    assert type(came) is type(error)
    assert body_of(came) == body_of(error)
    assert came.status == status
    assert ("retry-after" in refuse(came).headers) == (status == 503)


def test_a_refusal_keeps_the_time_until_a_retry() -> None:
    assert refuse(Refusal.of(Saturated("m", retry_after_s=2.5), "r", "", None).error()).headers["retry-after"] == "3"
    assert BodyTooLarge("m").status == 413


def test_replies_are_joined_in_order() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    parts = [(rows[:2], 5, "gpu", "r1"), (rows[2:], 7, "disk", "r2")]
    replies = [
        InferenceReply(EmbedResult(part.tobytes(), 4), tokens, tier, "native", name, "v1", 0.0, 0.0, LOAD)
        for part, tokens, tier, name in parts
    ]
    answer = join_embeddings(replies)
    assert_array_equal(answer.vectors, rows)
    assert answer.headers == {
        "x-ranklet-replica": "r1,r2", "x-ranklet-revision": "v1", "x-ranklet-tier": "gpu,disk",
        "x-ranklet-backend": "native",
    }  # fmt: skip
    body = orjson.loads(render_embeddings(answer, "m", "float"))
    assert [entry["embedding"] for entry in body["data"]] == rows.tolist()
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
