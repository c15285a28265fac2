"""The steps of an inference call: their order, and what is undone when a call ends early."""

import asyncio
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.exchange import Exchange
from ranklet.cluster.message import Refusal
from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.errors import InternalError
from tests.cluster.ingress.parts import BASE, MAX_MODEL_LEN, Parts

WORDS = "six words of a short text"


async def until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110  # a thread of the intake changes it
            await asyncio.sleep(0.001)


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def test_a_request_is_answered_and_leaves_nothing_behind(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    answer = await parts.post("legal-v2", [WORDS, "two words"])
    assert answer.status_code == 200
    assert answer.json()["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert len(answer.json()["data"]) == 2
    assert answer.headers["x-ranklet-replica"] == "r0"
    assert parts.admission.in_flight == 0
    assert parts.sample("ranklet_requests_total", adapter="legal-v2", status="200", code="") == 1


async def test_a_text_that_must_be_too_long_is_refused_without_tokenising_it(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    accents = "\u0301" * 15_000_000  # 30 MB
    answer = await parts.http.post("/v1/embeddings", content=f'{{"model": "{BASE}", "input": "{accents}"}}'.encode())
    assert error_of(answer) == (400, "invalid_request_error", "input")
    assert f"expected 1 to {MAX_MODEL_LEN} tokens" in answer.json()["error"]["message"]
    assert parts.tokenizer.encoded == []


async def test_after_a_text_that_is_too_long_no_others_are_tokenised(tmp_path: Path) -> None:
    parts = Parts(tmp_path, LimitsConfig(max_tokenising_bytes=100_000))  # several slices
    longest, too_long = "w " * MAX_MODEL_LEN, "w " * (MAX_MODEL_LEN + 1)
    answer = await parts.post(BASE, [*[longest] * 15, too_long, *[longest] * 60])
    assert error_of(answer) == (400, "invalid_request_error", "input")
    assert f"input[15]: expected 1 to {MAX_MODEL_LEN} tokens" in answer.json()["error"]["message"]
    assert [len(each) for each in parts.tokenizer.encoded] == [12, 12]


async def test_rights_and_quota_are_checked_before_a_text_is_tokenised(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"other": (("medical-*",), None), "poor": (("*",), 1)})
    assert error_of(await parts.post("legal-v2", WORDS)) == (401, "unauthorized", None)
    assert error_of(await parts.post("legal-v2", WORDS, key="other")) == (403, "forbidden", "model")
    assert parts.tokenizer.encoded == []
    assert (await parts.post("legal-v2", WORDS, key="poor")).status_code == 200
    assert len(parts.tokenizer.encoded) == 1
    refused = await parts.post("legal-v2", WORDS, key="poor")
    assert error_of(refused) == (429, "rate_limit_exceeded", None)
    assert int(refused.headers["retry-after"]) >= 1
    assert len(parts.tokenizer.encoded) == 1
    assert parts.sample("ranklet_quota_rejections_total", by="key", adapter="legal-v2") == 1
    assert parts.sample("ranklet_requests_total", adapter="legal-v2", status="429", code="rate_limit_exceeded") == 1


@pytest.mark.parametrize("model", ["x" * 5_000_000, "a@" * 300_000, "/" * 5_000_000])
async def test_a_very_long_name_is_refused_before_similar_names_are_searched(tmp_path: Path, model: str) -> None:
    parts = Parts(tmp_path)
    for fields, param in (({"model": model}, "model"), ({"lora_path": model}, "lora_path")):
        answer = await parts.http.post("/v1/embeddings", json={"input": WORDS, **fields})
        assert error_of(answer) == (404, "model_not_found", param)
        assert len(answer.text) < 1000


async def test_a_key_learns_nothing_of_models_that_it_may_not_use(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"medical": (("medical-*",), None), "nothing": ((), None), "all": (("*",), None)})
    for name in ("legal-v1", "medical-v1", "medical-v2", "medical-v1@x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text("{}")
    served, missing = ("legal-v2", "legal-v1@r1", "base:legal-v2"), ("legal", "legal-v9", "legal-v9@r1", "base:legal")
    for model in (*served, *missing, BASE):
        for field in ("model", "lora_path"):
            answers = [
                await parts.http.post(
                    "/v1/embeddings", json={"input": WORDS, field: model}, headers={"x-api-key": parts.secrets[key]}
                )
                for key in ("medical", "nothing")
            ]
            if (model, field) != (BASE, "lora_path"):
                assert {error_of(answer) for answer in answers} == {(403, "forbidden", "model")}, model
            assert "legal" not in "".join(answer.text for answer in answers).replace(model.removeprefix("base:"), "")
    near = (await parts.post("medical-v", WORDS, key="medical")).json()["error"]["message"]
    assert "medical-v1" in near
    assert "legal" not in near
    assert "legal-v1" in (await parts.post("legal", WORDS, key="all")).json()["error"]["message"]
    assert (await parts.post("medical-v1@x", WORDS, key="medical")).status_code == 200


async def test_a_name_of_many_revisions_is_unknown(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    for model in ("legal-v2" + "@" * 200, "\u00e9" + "@" * 1000, "base:" + "@" * 250):
        assert error_of(await parts.post(model, WORDS)) == (404, "model_not_found", "model")


async def test_an_answer_is_charged_and_a_failed_call_is_not(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"team": (("*",), 13)})
    parts.handle.refusal = Refusal.of(InternalError("the device failed"), "r0", "", None)
    for _ in range(5):
        assert (await parts.post(BASE, WORDS, key="team")).status_code == 500
    parts.handle.refusal = None
    assert (await parts.post(BASE, WORDS, key="team")).status_code == 200
    assert (await parts.post(BASE, WORDS, key="team")).status_code == 200
    assert (await parts.post(BASE, WORDS, key="team")).status_code == 429
    assert parts.admission.in_flight == 0


async def test_replicas_learn_the_name_of_the_key_and_not_the_key(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"team": (("*",), None)})
    assert (await parts.post(BASE, WORDS, key="team")).status_code == 200
    (call,) = parts.handle.calls
    assert call.key_name == "team"
    assert parts.secrets["team"].encode() not in pickle.dumps(call)
    assert parts.secrets["team"].removeprefix("rk-").encode() not in pickle.dumps(call)


async def test_a_cancelled_call_gives_back_its_admission_and_its_quota(tmp_path: Path) -> None:
    """Serve cancels the call when the client disconnects."""
    limits = LimitsConfig(max_in_flight_requests=1)
    parts = Parts(tmp_path, limits, keys={"team": (("*",), 7)})
    parts.handle.is_silent = True
    for number in range(5):
        call = asyncio.ensure_future(parts.post(BASE, WORDS, key="team"))
        await until(lambda number=number: len(parts.handle.calls) == number + 1)  # type: ignore[misc]
        assert parts.admission.in_flight == 1
        assert error_of(await parts.post(BASE, WORDS, key="team")) == (503, "saturated", None)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert parts.admission.in_flight == 0
    assert parts.sample("ranklet_client_gone_total") == 5
    parts.handle.is_silent = False
    assert (await parts.post(BASE, WORDS, key="team")).status_code == 200


async def test_a_client_that_disconnects_while_it_sends_gives_back_its_admission(tmp_path: Path) -> None:
    parts = Parts(tmp_path)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
    answer = await Exchange(parts.services, parts.parse, Request(scope, receive)).answer()
    assert answer.status_code == 499
    assert parts.admission.in_flight == 0
    assert parts.sample("ranklet_client_gone_total") == 1


async def test_the_bytes_under_tokenisation_are_bounded_and_the_rest_waits(tmp_path: Path) -> None:
    limits = LimitsConfig(max_tokenising_bytes=250_000)
    parts = Parts(tmp_path, limits, keys=dict.fromkeys("abcd", (("*",), None)))
    texts = ["word " * 4_000] * 10  # 20 kB each
    answers = await asyncio.gather(*(parts.post(BASE, texts, key=name) for name in "abcd" for _ in range(3)))
    assert {answer.status_code for answer in answers} == {200}
    assert {len(answer.json()["data"]) for answer in answers} == {10}
    assert 0 < parts.tokenizer.most_bytes <= 250_000


async def test_a_small_text_does_not_wait_for_the_large_texts_of_another_key(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"large": (("*",), None), "small": (("*",), None)})
    parts.tokenizer.released.clear()
    texts = ["word " * 4_000] * 10
    large = [asyncio.ensure_future(parts.post(BASE, texts, key="large")) for _ in range(8)]
    try:
        await until(lambda: len(parts.tokenizer.encoded) == 3)  # three of the four threads
        for _ in range(5):
            assert (await parts.post(BASE, WORDS, key="small")).status_code == 200
        assert not any(call.done() for call in large)
    finally:
        parts.tokenizer.released.set()
    assert {answer.status_code for answer in await asyncio.gather(*large)} == {200}


async def test_texts_of_clients_that_disconnected_count_until_their_threads_end(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.tokenizer.released.clear()
    texts = ["word " * 4_000] * 10
    left = [asyncio.ensure_future(parts.post(BASE, texts)) for _ in range(3)]
    try:
        await until(lambda: len(parts.tokenizer.encoded) == 3)
        for call in left:
            call.cancel()
        stays = asyncio.ensure_future(parts.post(BASE, texts))
        for _ in range(5):
            assert (await parts.post(BASE, WORDS)).status_code == 200
        assert [len(each) for each in parts.tokenizer.encoded] == [10, 10, 10, 1, 1, 1, 1, 1]
    finally:
        parts.tokenizer.released.set()
    assert (await stays).status_code == 200
    assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*left, return_exceptions=True))
    assert parts.admission.in_flight == 0


async def test_large_bodies_that_find_no_room_are_refused_and_leave_none_behind(tmp_path: Path) -> None:
    parts = Parts(tmp_path, LimitsConfig(max_held_body_bytes=200_000))
    for _ in range(5):
        assert error_of(await parts.post(BASE, ["word " * 4_000] * 10)) == (503, "saturated", None)
        assert (await parts.post(BASE, ["word " * 4_000] * 5)).status_code == 200
        packed = gzip.compress(json.dumps({"model": BASE, "input": ["word " * 4_000] * 10}).encode())
        answer = await parts.http.post("/v1/embeddings", content=packed, headers={"content-encoding": "gzip"})
        assert error_of(answer) == (503, "saturated", None), "its size counts after it is inflated"
    assert (await parts.post(BASE, WORDS)).status_code == 200
    assert not parts.services.intake.room.held


async def test_the_texts_of_a_large_request_keep_their_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path, LimitsConfig(max_tokenising_bytes=100_000))  # several slices
    texts = ["word " * (1 + number % 3000) for number in range(600)]
    assert (await parts.post(BASE, texts)).status_code == 200
    assert len(parts.tokenizer.encoded) > 1
    lengths = [len(prompt) for call in parts.handle.calls for prompt in call.prompts()]
    assert lengths == [1 + number % 3000 for number in range(600)]
