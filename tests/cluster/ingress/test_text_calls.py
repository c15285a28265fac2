"""Text calls of a gateway: each token is received once and in order."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.message import InferenceCall, InferenceReply
from ranklet.cluster.text_result import GenerateResult, PackedLogprobs
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest, Unavailable
from ranklet.replicas.model.sampled import TokenLogprob
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import TextHint
from tests.cluster.ingress.text_replica import PARAMS, PROMPTS, TEXT, KeptText, TextReplica, failure, reply
from tests.virtual_time import run_in_virtual_time


def client_of(replica: Any, retries: list[bool] | None = None, **limits: float) -> ReplicasClient:
    affinity = Affinity()
    affinity.set_members([Member("r0", 0)])
    counted = [] if retries is None else retries
    return ReplicasClient(replica, affinity, LimitsConfig.model_validate(limits), counted.append, "gateway")


def generate(
    replica: TextReplica, kept: KeptText, *, prompts: Sequence[NDArray[np.int32]] = PROMPTS,
    params: GenerateParams = PARAMS, retries: list[bool] | None = None, **limits: float,
) -> list[InferenceReply[GenerateResult]]:  # fmt: skip
    """Run one request in virtual time."""

    async def run() -> list[InferenceReply[GenerateResult]]:
        return await client_of(replica, retries, **limits).generate(None, prompts, params, kept)

    return run_in_virtual_time(run())


async def stream(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
    replica.begin(call.number)
    for i, token in enumerate(TEXT):
        replica.send((call.number, 0, i, (token,), None))
        await asyncio.sleep(1)
    return reply(TEXT)


def test_pieces_are_received_as_they_come_and_the_replies_are_returned() -> None:
    replica, kept = TextReplica(stream), KeptText()
    (answer,) = generate(replica, kept)
    assert kept.tokens == {0: list(TEXT)}
    assert [(each.replica, each.revision, each.tier) for each in kept.begun] == [("r0", "v1", "gpu")]
    assert answer.result.choices[0].ids().tolist() == list(TEXT)
    (hint,) = replica.hints
    assert (hint.id, hint.work, hint.text) == (replica.calls[0].number, 4, TextHint([], 1, 4 + 5))
    assert replica.opened == 1


def test_an_answer_without_pieces_is_received_whole() -> None:
    scores = tuple(TokenLogprob(-float(i), ((i, -0.5),)) for i in range(5))

    async def silent(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        replica.send((call.number, 0, 0, TEXT[:2], scores[:2]))
        await asyncio.sleep(1)
        return reply(TEXT, logprobs=PackedLogprobs.of(scores))

    kept = KeptText()
    generate(TextReplica(silent), kept)
    assert kept.tokens == {0: list(TEXT)}
    assert kept.logprobs == list(scores)


def test_repeated_pieces_are_dropped_and_a_gap_is_filled_at_the_end() -> None:
    async def careless(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        number = call.number
        replica.send((number, 0, 0, TEXT[:2], None), (number, 0, 0, TEXT[:2], None), (number + 77, 0, 2, (9,), None))
        replica.send((number, 0, 1, TEXT[1:3], None))
        await asyncio.sleep(1)
        assert kept.tokens == {0: list(TEXT[:3])}
        replica.send((number, 0, 4, TEXT[4:], None))
        await asyncio.sleep(1)
        assert kept.tokens == {0: list(TEXT[:3])}
        return reply(TEXT)

    kept = KeptText()
    generate(TextReplica(careless), kept)
    assert kept.tokens == {0: list(TEXT)}


def test_a_broken_feed_is_opened_again() -> None:
    async def breaking(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        replica.send((call.number, 0, 0, TEXT[:2], None))
        replica.break_feed()
        await asyncio.sleep(5)
        replica.send((call.number, 0, 2, TEXT[2:4], None))
        await asyncio.sleep(1)
        assert kept.tokens == {0: list(TEXT[:4])}
        return reply(TEXT)

    replica, kept = TextReplica(breaking), KeptText()
    generate(replica, kept)
    assert kept.tokens == {0: list(TEXT)}
    assert replica.opened == 2


def test_the_texts_of_a_request_are_counted_over_its_calls() -> None:
    async def two_of_each(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        texts = [(int(prompt[0]), choice) for prompt in call.prompts() for choice in range(2)]
        for index in reversed(range(len(texts))):
            replica.send((call.number, index, 0, texts[index], None))
        await asyncio.sleep(1)
        return reply(*texts)

    prompts = [np.array([number], np.int32) for number in range(40)]
    replica, kept = TextReplica(two_of_each, two_of_each), KeptText()
    replies = generate(replica, kept, prompts=prompts, params=GenerateParams(max_tokens=2, n=2))
    assert [len(each.result.choices) for each in replies] == [64, 16]
    assert kept.tokens == {index: [index // 2, index % 2] for index in range(80)}
    assert len({call.number for call in replica.calls}) == 2


def test_a_text_that_is_not_wanted_any_more_is_ended_once() -> None:
    async def two(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        for start in range(4):
            replica.send(*((call.number, index, start, (start,), None) for index in range(2)))
            await asyncio.sleep(1)
        return reply(range(4), range(4))

    replica, kept = TextReplica(two), KeptText(most=2)
    generate(replica, kept, params=GenerateParams(max_tokens=4, n=2))
    assert kept.tokens == {0: [0, 1], 1: [0, 1]}
    number = replica.calls[0].number
    assert replica.finished == [(number, 0), (number, 1)]


async def fail_at_once(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
    replica.begin(call.number)
    await asyncio.sleep(1)
    return failure()


def test_a_call_that_fails_before_its_first_piece_is_repeated_elsewhere() -> None:
    replica, kept, retries = TextReplica(fail_at_once, stream), KeptText(), list[bool]()
    generate(replica, kept, retries=retries)
    assert kept.tokens == {0: list(TEXT)}
    assert [hint.avoid for hint in replica.hints] == [None, "r0"]
    assert replica.calls[0].number != replica.calls[1].number
    assert len(kept.begun) == 2
    assert retries == [False]


def test_pieces_of_an_attempt_that_has_ended_are_dropped() -> None:
    async def late(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        replica.send((replica.calls[0].number, 0, 0, (99,), None))
        return await stream(replica, call)

    kept = KeptText()
    generate(TextReplica(fail_at_once, late), kept)
    assert kept.tokens == {0: list(TEXT)}


def test_the_timeout_starts_again_with_each_piece() -> None:
    async def slow(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        for i, token in enumerate(TEXT):
            await asyncio.sleep(7)
            replica.send((call.number, 0, i, (token,), None))
        await asyncio.sleep(1 if len(replica.calls) == 1 else 1000)
        return reply(TEXT)

    kept = KeptText()
    generate(TextReplica(slow), kept, request_timeout_s=10.0)
    assert kept.tokens == {0: list(TEXT)}

    async def silent_after(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
        await asyncio.sleep(7)
        replica.send((call.number, 0, 0, TEXT[:1], None))
        await asyncio.sleep(1000)

    async def run() -> float:
        client, loop = client_of(TextReplica(silent_after), request_timeout_s=10.0), asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(Unavailable, match="expected a token within 10 s"):
            await client.generate(None, PROMPTS, PARAMS, KeptText())
        return loop.time() - began_s

    assert 17 <= run_in_virtual_time(run()) <= 17 + 10 / 8


def test_a_result_that_no_message_carries_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        generate(TextReplica(), KeptText(), params=GenerateParams(max_tokens=32_000, n=2, logprobs=20))


def test_feeds_of_replicas_that_are_gone_are_closed_once_no_text_needs_them() -> None:
    async def run() -> None:
        affinity = Affinity()
        replica = TextReplica(stream)
        client = ReplicasClient(replica, affinity, LimitsConfig(), lambda continues: None, "gateway")  # type: ignore[arg-type]
        client.feeds.update()
        affinity.set_members([Member("r0", 0)])
        client.feeds.update()
        assert replica.opened == 0, "no text request has come"
        kept = KeptText()
        call = asyncio.ensure_future(client.generate(None, PROMPTS, PARAMS, kept))
        await asyncio.sleep(2.5)
        affinity.set_members([])
        client.feeds.update()
        await call
        assert kept.tokens == {0: list(TEXT)}
        assert client.feeds.replicas == {"r0"}
        client.feeds.update()
        await asyncio.sleep(0)
        assert client.feeds.replicas == set()

    run_in_virtual_time(run())


def test_feeds_that_were_stopped_are_closed_and_stay_closed() -> None:
    async def run() -> None:
        replica, kept = TextReplica(stream, stream), KeptText()
        client = client_of(replica)
        await client.generate(None, PROMPTS, PARAMS, kept)
        assert client.feeds.replicas == {"r0"}
        client.feeds.stop()
        await asyncio.sleep(5)
        assert client.feeds.replicas == set()
        begun = kept.begun.copy()
        kept.tokens.clear()
        (reply,) = await client.generate(None, PROMPTS, PARAMS, kept)
        assert kept.tokens == {0: list(TEXT)}, "the whole answer has them"
        (last,) = kept.begun[len(begun) :]
        assert (last.replica, last.revision, last.tier) == (reply.replica, reply.revision, reply.tier)
        assert (client.feeds.replicas, replica.opened) == (set(), 1)

    run_in_virtual_time(run())
