"""Replicas that fail after a part of a text: others continue it, each token comes once, and there is an end to it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.message import InferenceCall, InferenceReply, Refusal
from ranklet.cluster.text_result import GenerateResult, PackedLogprobs
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import RankletError, Saturated, Unavailable
from ranklet.replicas.model.sampled import TokenLogprob
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from tests.cluster.ingress.text_replica import PROMPTS, KeptText, Script, TextReplica, failure, reply
from tests.virtual_time import run_in_virtual_time

TEXTS = ((11, 12, 13, 14, 15, 16), (21, 22, 23, 24, 25, 26))
PARAMS = GenerateParams(max_tokens=6, n=2)
ADAPTER = AdapterLocation("legal", "/adapters/legal")
Call = InferenceCall[GenerateParams]


def given_tokens(call: Call) -> list[list[int]]:
    """Return the tokens that the texts of a call have already."""
    return [[], []] if call.continuation is None else [text.tolist() for text in call.continuation.texts()]


def generating(dies_after: int | None = None, *, ends: bool = False) -> Script:
    """Return a replica that makes a token of each of two texts a second.

    Args:
        dies_after: number of tokens that it makes of each before it fails; None makes all.
        ends: whether its process fails, not only its engine.
    """

    async def run(replica: TextReplica, call: Call) -> Any:
        replica.begin(call.number)
        made = [len(tokens) for tokens in given_tokens(call)]
        for turn in range(len(TEXTS[0])):
            if turn == dies_after and ends:
                raise RayActorError
            if turn == dies_after:
                return failure()
            await asyncio.sleep(1)
            for index, text in enumerate(TEXTS):
                if made[index] < len(text):
                    replica.send((call.number, index, made[index], (text[made[index]],), None))
                    made[index] += 1
        return reply(*TEXTS)

    return run


def refusing(error: RankletError) -> Script:
    async def run(replica: TextReplica, call: Call) -> Any:
        return Refusal.of(error, "r0", "", None)

    return run


def generate(
    replica: TextReplica, kept: KeptText, params: GenerateParams = PARAMS, repeats: list[bool] | None = None,
    *, is_member: bool = False,
) -> tuple[list[InferenceReply[GenerateResult]], float]:  # fmt: skip
    """Run one request in virtual time. Returns the replies, and how many seconds it took.

    Args:
        is_member: whether the replica was a member of the deployment when it failed. Else it was drained.
    """

    async def run() -> tuple[list[InferenceReply[GenerateResult]], float]:
        affinity, loop = Affinity(), asyncio.get_running_loop()
        affinity.set_members([Member("r0", 0)])
        replica.affinity = affinity if is_member else None
        handle: Any = replica
        counted = [] if repeats is None else repeats
        client = ReplicasClient(handle, affinity, LimitsConfig(), counted.append, "gateway")
        began_s = loop.time()
        return await client.generate(ADAPTER, PROMPTS, params, kept), loop.time() - began_s

    return run_in_virtual_time(run())


def test_a_text_goes_on_in_a_replica_that_drains_while_no_other_is_up() -> None:
    """It takes six seconds; a call that no replica works on is given up after three."""

    async def run() -> None:
        affinity, handle = Affinity(), TextReplica(generating())
        affinity.set_members([Member("r0", 0)])
        given: Any = handle
        limits = LimitsConfig(no_replica_timeout_s=3.0)
        client = ReplicasClient(given, affinity, limits, lambda continues: None, "gateway")
        watching = asyncio.ensure_future(client.watchdog.run())
        asyncio.get_running_loop().call_later(1.5, affinity.set_members, [])
        await client.generate(ADAPTER, PROMPTS, PARAMS, kept)
        watching.cancel()

    kept = KeptText()
    run_in_virtual_time(run())
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))


def test_a_text_goes_on_elsewhere_from_its_tokens() -> None:
    replica, kept, repeats = TextReplica(generating(2), generating()), KeptText(), list[bool]()
    generate(replica, kept, repeats=repeats)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    first, second = replica.calls
    assert given_tokens(second) == [[11, 12], [21, 22]]
    assert second.continuation is not None
    assert second.continuation.base_revision == "b1"
    assert second.adapter == AdapterLocation("legal", "/adapters/legal", "v1")
    assert [hint.avoid for hint in replica.hints] == [None, "r0"]
    assert second.work == first.work + 4
    assert first.number != second.number
    assert repeats == [True]


@pytest.mark.parametrize("seed", [None, -1, 7])
def test_every_replica_draws_with_one_seed(seed: int | None) -> None:
    replica = TextReplica(generating(2), generating())
    generate(replica, KeptText(), GenerateParams(max_tokens=6, n=2, seed=seed))
    first, second = (call.params.seed for call in replica.calls)
    assert first is not None
    assert first == second
    assert first == 7 if seed == 7 else first >= 0


@given(st.lists(st.integers(1, 3), max_size=3))
def test_a_text_survives_three_replicas_that_fail(progress: list[int]) -> None:
    replica, kept = TextReplica(*map(generating, progress), generating()), KeptText()
    (answer,), _ = generate(replica, kept)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    assert [choice.ids().tolist() for choice in answer.result.choices] == [list(text) for text in TEXTS]


def test_a_text_that_is_complete_makes_its_last_token_again_and_is_ended() -> None:
    kept = KeptText(end_ids=frozenset({13, 22}))

    async def ends_early(replica: TextReplica, call: Call) -> Any:
        replica.begin(call.number)
        replica.send((call.number, 0, 0, (11, 12, 13), None), (call.number, 1, 0, (21,), None))
        await asyncio.sleep(1)
        return failure()

    replica = TextReplica(ends_early, generating())
    generate(replica, kept)
    assert kept.tokens == {0: [11, 12, 13], 1: list(TEXTS[1])}
    assert given_tokens(replica.calls[1]) == [[11, 12], [21]]
    assert replica.finished == [(replica.calls[1].number, 0)]


def test_a_text_that_the_client_ended_stays_ended() -> None:
    replica, kept = TextReplica(generating(3), generating()), KeptText(most=2)
    generate(replica, kept)
    assert kept.tokens == {0: [11, 12], 1: [21, 22]}
    assert given_tokens(replica.calls[1]) == [[11], [21]]
    first, second = (call.number for call in replica.calls)
    assert replica.finished == [(first, 0), (first, 1), (second, 0), (second, 1)]


def test_a_replica_that_fails_after_the_last_token_costs_no_token() -> None:
    replica, kept = TextReplica(generating(6), generating()), KeptText()

    async def dies_at_its_end(replica: TextReplica, call: Call) -> Any:
        await generating()(replica, call)
        await asyncio.sleep(1)
        return failure()

    replica.scripts[0] = dies_at_its_end
    generate(replica, kept)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    assert given_tokens(replica.calls[1]) == [list(text[:5]) for text in TEXTS]


def test_logprobs_of_the_rest_come_with_the_whole_answer() -> None:
    scores = tuple(TokenLogprob(-float(i), ((i, -0.5),)) for i in range(6))

    async def fed(replica: TextReplica, call: Call) -> Any:
        replica.begin(call.number)
        replica.send((call.number, 0, 0, TEXTS[0][:2], scores[:2]))
        await asyncio.sleep(1)
        return failure()

    async def silent(replica: TextReplica, call: Call) -> Any:
        replica.send((call.number, 0, 2, TEXTS[0][2:3], scores[2:3]))
        await asyncio.sleep(1)
        return reply(TEXTS[0], logprobs=PackedLogprobs.of(scores[2:]))

    kept = KeptText()
    generate(TextReplica(fed, silent), kept, GenerateParams(max_tokens=6, logprobs=1))
    assert kept.tokens == {0: list(TEXTS[0])}
    assert kept.logprobs == list(scores)


def check_failure(scripts: Sequence[Script], calls: int, message: str) -> TextReplica:
    replica, kept = TextReplica(*scripts), KeptText()
    with pytest.raises(Unavailable, match=message):
        generate(replica, kept)
    assert len(replica.calls) == calls
    assert all(list(TEXTS[index][: len(tokens)]) == tokens for index, tokens in kept.tokens.items())
    return replica


@pytest.mark.parametrize("before", [0, 1])
def test_a_call_under_which_two_engines_die_is_not_given_to_a_third(before: int) -> None:
    """Tokens between the deaths show that the call is not their cause."""
    scripts = [generating(1)] * before + [generating(2), generating(0), generating()]
    check_failure(scripts, before + 2, "each other that got the rest failed too")


def test_replicas_that_are_drained_do_not_count() -> None:
    replica, kept = TextReplica(generating(1), *(generating(turn % 2, ends=True) for turn in range(6))), KeptText()
    replica.scripts.append(generating())
    generate(replica, kept)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))


def test_replicas_whose_process_dies_do_not_make_a_text_suspect() -> None:
    """A text may end engines. Processes around them end together, as with their node: here three, without a token."""
    replica, kept = TextReplica(generating(2), *[generating(0, ends=True)] * 2, generating()), KeptText()
    generate(replica, kept, is_member=True)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    again = TextReplica(generating(2), *[generating(0, ends=True)] * 3, generating())
    with pytest.raises(Unavailable, match="each other that got the rest failed too"):
        generate(again, KeptText(), is_member=True)
    assert len(again.calls) == 4


def test_a_call_is_continued_three_times_at_most() -> None:
    check_failure([generating(1)] * 5, 4, "each other that got the rest failed too")


@pytest.mark.parametrize("error", [Saturated("the queue is full"), Unavailable("the engine's process has ended")])
def test_replicas_that_accept_no_rest_are_asked_again_for_ten_seconds(error: RankletError) -> None:
    replica, kept = TextReplica(generating(2), *[refusing(error)] * 4, generating()), KeptText()
    _, took_s = generate(replica, kept)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    assert took_s == pytest.approx(2 + 0.1 + 0.2 + 0.4 + 0.8 + 6, abs=0.1)
    refused = check_failure([generating(2), *[refusing(error)] * 99], 15, error.message)
    assert refused.calls[-1].continuation == refused.calls[1].continuation


def test_a_call_without_tokens_is_refused_soon() -> None:
    replica = TextReplica(*[refusing(Saturated("the queue is full"))] * 3)
    with pytest.raises(Saturated, match="the queue is full"):
        generate(replica, KeptText())
    assert len(replica.calls) == 2


def test_tokens_that_came_behind_a_gap_are_made_again() -> None:
    async def careless(replica: TextReplica, call: Call) -> Any:
        replica.begin(call.number)
        replica.send((call.number, 0, 0, (11,), None), (call.number, 0, 2, (13,), None))
        await asyncio.sleep(1)
        return failure()

    replica, kept = TextReplica(careless, generating()), KeptText()
    generate(replica, kept)
    assert kept.tokens == dict(enumerate(map(list, TEXTS)))
    assert [np.array(text).tolist() for text in given_tokens(replica.calls[1])] == [[11], []]
