"""Streams of a gateway: errors, slow readers and clients that leave; what a stream holds until its end."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.status import RecentRequests
from ranklet.cluster.message import InferenceCall, Refusal
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InternalError, UnknownModel
from tests.cluster.ingress.test_exchange import until
from tests.cluster.ingress.text_parts import LIMITS, AsgiCall, DescribingReplica, TextParts
from tests.cluster.ingress.text_replica import failure, reply
from tests.cluster.text_client import CHAT, COMPLETIONS, events_of

TEXT = tuple(range(40, 60))
FIELDS = {"prompt": [50, 51, 52, 53], "max_tokens": len(TEXT)}
Call = InferenceCall[GenerateParams]
MakeParts = Callable[..., TextParts]


async def whole(replica: Any, call: Call) -> Any:
    replica.begin(call.number)
    for i, token in enumerate(TEXT):
        replica.send((call.number, 0, i, (token,), None))
    return reply(TEXT)


async def token_by_token(replica: Any, call: Call) -> Any:
    for i, token in enumerate(TEXT):
        replica.send((call.number, 0, i, (token,), None))
        await asyncio.sleep(0.002)
    return reply(TEXT)


async def refused(replica: Any, call: Call) -> Any:
    return Refusal.of(InternalError("the device failed"), "r0", "", None)


async def fails_later(replica: Any, call: Call) -> Any:
    """Bring three tokens before the replica fails; nothing if the text has them already."""
    replica.begin(call.number)
    if call.continuation is None:
        replica.send((call.number, 0, 0, TEXT[:3], None))
    await asyncio.sleep(0.05)
    return failure()


async def endless(replica: Any, call: Call) -> Any:
    replica.begin(call.number)
    replica.send((call.number, 0, 0, TEXT[:3], None))
    await asyncio.Event().wait()


@pytest.fixture
async def make_parts(tmp_path: Path) -> AsyncIterator[MakeParts]:
    """Return a function that makes the parts of a gateway. Its feeds are closed at the end."""
    made: list[TextParts] = []

    def make(*arguments: Any, **given: Any) -> TextParts:
        made.append(TextParts(tmp_path, *arguments, **given))
        return made[-1]

    yield make
    for parts in made:
        parts.close()


def used(parts: TextParts) -> int:
    return parts.admission.in_flight


async def test_a_stream_has_the_text_and_headers_of_its_replica(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(whole))
    call = AsgiCall(parts.app, COMPLETIONS, FIELDS)
    await call.run()
    headers = dict(call.sent[0]["headers"])
    assert headers[b"x-ranklet-replica"] == b"r0"
    events = events_of(call.body)
    assert "".join(event["choices"][0]["text"] for event in events) == parts.texts.tokens.backend.decode(list(TEXT))
    assert events[0]["system_fingerprint"] == "fp_abcdef01"
    assert used(parts) == 0
    assert parts.sample("ranklet_requests_total", adapter="base", status="200", code="") == 1
    assert parts.sample("ranklet_text_choices_total", adapter="base", reason="length") == 1


async def test_the_log_has_the_times_to_the_first_token(
    make_parts: MakeParts, caplog: pytest.LogCaptureFixture
) -> None:
    async def timed(replica: Any, call: Call) -> Any:
        return replace(await whole(replica, call), first_piece_s=0.25)

    parts = make_parts(DescribingReplica(timed))
    parts.services = replace(parts.services, observer=Observer(parts.metrics, RecentRequests(), "all", "gateway"))
    with caplog.at_level(logging.INFO, "ray.serve.requests"):
        await AsgiCall(parts.app, COMPLETIONS, FIELDS).run()
    (line,) = caplog.messages
    assert " engine_first_token_ms=250.0" in line
    assert " first_token_ms=" in line


async def test_frames_that_wait_together_are_one_write(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(whole))
    call = AsgiCall(parts.app, COMPLETIONS, FIELDS)
    call.reads.clear()
    running = asyncio.ensure_future(call.run())
    await asyncio.sleep(0.3)
    call.reads.set()
    await running
    assert len(events_of(call.body)) > 5
    assert len(call.sent) == 2  # the start, and one body with all frames


async def test_an_error_before_the_first_token_is_a_status(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(refused))
    call = AsgiCall(parts.app, CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    await call.run()
    assert call.sent[0]["status"] == 500
    assert orjson.loads(call.body)["error"]["code"] == "internal_error"
    assert used(parts) == 0


async def test_an_error_after_the_first_token_is_an_event(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(fails_later, fails_later))
    call = AsgiCall(parts.app, CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    await call.run()
    assert call.sent[0]["status"] == 200
    *texts, last = events_of(call.body)
    assert len(texts) >= 2
    assert last["error"]["code"] == "unavailable"
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert parts.sample("ranklet_requests_total", adapter="base", status="503", code="unavailable") == 1
    assert parts.sample("ranklet_text_cancelled_total", adapter="base", reason="error") == 1
    assert used(parts) == 0


async def test_a_client_that_leaves_cancels_and_pays_for_what_was_made(make_parts: MakeParts) -> None:
    replica = DescribingReplica(endless)
    parts = make_parts(replica, keys={"team": (("*",), 1000)})
    call = AsgiCall(parts.app, COMPLETIONS, FIELDS, key=parts.secrets["team"])
    running = asyncio.ensure_future(call.run())
    await until(lambda: len(call.sent) > 1)
    assert used(parts) == 1
    assert [each.key_name for each in replica.calls] == ["team"]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert used(parts) == 0
    assert parts.sample("ranklet_text_cancelled_total", adapter="base", reason="client_gone") == 1
    assert await parts.spent() == 4 + 3


async def test_a_slow_reader_ends_only_its_own_request(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(token_by_token, whole), limits={"max_waiting_stream_bytes": 1000})
    slow, quick = (AsgiCall(parts.app, COMPLETIONS, FIELDS) for _ in range(2))
    slow.reads.clear()
    running = asyncio.ensure_future(slow.run())
    await asyncio.sleep(0.2)
    slow.reads.set()
    await running
    assert events_of(slow.body)[-1]["error"]["code"] == "reader_too_slow"
    assert parts.sample("ranklet_text_cancelled_total", adapter="base", reason="slow_reader") == 1
    await quick.run()
    assert used(parts) == 0


async def test_frames_that_come_at_once_are_not_too_many_for_a_client_that_reads(make_parts: MakeParts) -> None:
    """An echoed prompt with logprobs comes with the whole answer."""

    async def at_once(replica: Any, call: Call) -> Any:
        replica.begin(call.number)
        await asyncio.sleep(0.05)
        return reply(*[TEXT] * 4)

    parts = make_parts(DescribingReplica(at_once), limits={"max_waiting_stream_bytes": 1000})
    call = AsgiCall(parts.app, COMPLETIONS, {**FIELDS, "n": 4})
    await call.run()
    events = events_of(call.body)
    assert len(call.body) > 1000
    assert [event["choices"][0]["index"] for event in events] == [0, 1, 2, 3]


async def test_a_client_that_reads_nothing_is_dropped(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(whole), limits={"request_timeout_s": 0.3})
    call = AsgiCall(parts.app, COMPLETIONS, FIELDS)
    running = asyncio.ensure_future(call.run())
    await until(lambda: len(call.sent) > 0)
    call.reads.clear()
    await asyncio.wait_for(running, 5)
    assert used(parts) == 0


async def test_an_adapter_that_was_replaced_is_described_again(make_parts: MakeParts) -> None:
    async def replaced(replica: Any, call: Call) -> Any:
        replica.revision, replica.template = "v2", "new"
        assert call.adapter is not None
        assert call.adapter.requested_revision == "v1"
        return Refusal.of(UnknownModel("another revision", param="model"), "r0", "", None)

    parts = make_parts(DescribingReplica(whole, replaced, whole, whole))
    sent = {"model": "legal-v2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": len(TEXT)}
    for described in (1, 2, 2):
        call = AsgiCall(parts.app, CHAT, sent)
        await call.run()
        assert call.sent[0]["status"] == 200, call.body
        assert parts.replica.described == described
    assert [each.adapter and each.adapter.requested_revision for each in parts.replica.calls] == [
        "v1",
        "v1",
        "v2",
        "v2",
    ]
    assert parts.replica.calls[2].total_tokens == len(parts.texts.tokens.backend.encode("new").ids)


async def test_a_stream_whose_replica_fails_goes_on_and_counts_its_prompt_once(make_parts: MakeParts) -> None:
    async def rest(replica: Any, call: Call) -> Any:
        replica.send((call.number, 0, 3, TEXT[3:], None))
        return reply(TEXT)

    parts = make_parts(DescribingReplica(fails_later, rest), keys={"team": (("*",), 1000)})
    fields = {**FIELDS, "stream_options": {"include_usage": True}}
    call = AsgiCall(parts.app, COMPLETIONS, fields, key=parts.secrets["team"])
    await call.run()
    *events, last = events_of(call.body)
    assert "".join(event["choices"][0]["text"] for event in events) == parts.texts.tokens.backend.decode(list(TEXT))
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (4, len(TEXT))
    assert await parts.spent() == 4 + len(TEXT)


async def gone(replica: Any, call: Call) -> Any:
    replica.revision = "v2"
    return Refusal.of(UnknownModel("another revision", param="model"), "r0", "", None)


async def test_a_stream_of_a_replaced_adapter_that_no_replica_can_continue_ends_with_an_error(
    make_parts: MakeParts,
) -> None:
    parts = make_parts(DescribingReplica(fails_later, gone))
    call = AsgiCall(parts.app, COMPLETIONS, {**FIELDS, "model": "legal-v2"})
    await call.run()
    *texts, last = events_of(call.body)
    assert "".join(event["choices"][0]["text"] for event in texts) == parts.texts.tokens.backend.decode(list(TEXT[:3]))
    assert last["error"]["code"] == "adapter_loading"
    assert "was replaced meanwhile" in last["error"]["message"]


async def test_a_whole_answer_of_a_replaced_adapter_is_made_by_the_new_revision(make_parts: MakeParts) -> None:
    parts = make_parts(DescribingReplica(fails_later, gone, whole))
    answer = await parts.http_post(COMPLETIONS, {**FIELDS, "model": "legal-v2"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == parts.texts.tokens.backend.decode(list(TEXT))
    assert answer.json()["usage"]["completion_tokens"] == len(TEXT)
    revisions = [each.adapter and each.adapter.requested_revision for each in parts.replica.calls]
    assert revisions == ["v1", "v1", "v2"]


@pytest.mark.parametrize("tokens", [96, 97])
async def test_prompt_and_text_must_fit_into_the_context(make_parts: MakeParts, tokens: int) -> None:
    parts = make_parts(DescribingReplica(whole))
    answer = await parts.http_post(COMPLETIONS, {"model": "base", **FIELDS, "max_tokens": tokens})
    assert answer.status_code == (200 if tokens == 96 else 400)
    if tokens == 97:
        message = answer.json()["error"]["message"]
        assert "maximum context length is 100 tokens" in message
        assert "4 tokens" in message
        assert "97" in message


@pytest.mark.parametrize(("path", "side"), [(COMPLETIONS, None), (COMPLETIONS, "right"), (CHAT, None)])
async def test_prompts_are_truncated_as_the_request_wants(make_parts: MakeParts, path: str, side: str | None) -> None:
    parts = make_parts(DescribingReplica(whole))
    text = "a prompt of several words"
    given = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    ids = parts.texts.tokens.backend.encode(text if path == COMPLETIONS else f"{text}True").ids
    sent = {"model": "base", **given, "max_tokens": 5, "truncate_prompt_tokens": 3, "truncation_side": side}
    answer = await parts.http_post(path, sent)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == 3
    assert parts.replica.calls[0].prompts()[0].tolist() == (ids[:3] if side == "right" else ids[-3:])


async def test_routers_see_the_bases_pages_before_an_invocation(make_parts: MakeParts) -> None:
    replica = DescribingReplica(whole, whole)
    replica.invocation = (7, 8)
    parts = make_parts(replica, request_limits=replace(LIMITS, max_model_len=200))
    fields = {**FIELDS, "prompt": [*range(10, 80), 7, 8, *range(10, 70)]}
    for name in ("base", "legal-v2"):
        answer = await parts.http_post(COMPLETIONS, {**fields, "model": name})
        assert answer.status_code == 200, answer.text
    base, late = (hint.text.pages for hint in replica.hints)
    assert (len(base), len(late)) == (2, 2)
    assert (base[0] == late[0], base[1] == late[1]) == (True, False)
