"""A request gathers its outputs in order, ends once, and drops its other sequences when one fails."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink, Request, Ticket
from ranklet.replicas.engine.tasks import EmbedTask
from ranklet.replicas.errors import InternalError, RankletError
from tests.replicas.engine.given import HEAD

LIMITS = RequestLimits(max_model_len=10, hidden=4, vocab=100, max_embedding_len=10)
Ended = list[Answer | RankletError]


def make_request(prompts: int) -> tuple[Request, Ended]:
    ended: Ended = []
    task = EmbedTask(EmbedParams(), prompts, LIMITS, HEAD, normalize=True)
    ids = [np.zeros(i + 1, np.int32) for i in range(prompts)]
    return Request(task, ids, None, AnswerSink(ended.append), arrived_s=10.0), ended


def complete(
    request: Request, index: int, vector: Sequence[float], *, began_s: float = 10.0, ran_s: float = 0.0
) -> bool:
    output = np.asarray(vector, np.float32)
    sequence = request.sequences[index]
    _, is_done = request.on_output(sequence, output, began_s, ran_s)
    if request.is_complete:
        request.end("native")
    return is_done


def test_vectors_are_in_the_order_of_the_prompts() -> None:
    request, ended = make_request(3)
    request.tier = "host"
    for index in (2, 0, 1):
        assert not ended
        assert complete(request, index, [index, 1, 2, 3], began_s=11.0 + index, ran_s=0.5 - 0.1 * index)
    (answer,) = ended
    assert isinstance(answer, Answer)
    assert answer.result[:, 0].tolist() == [0, 1, 2]
    assert (answer.tier, answer.backend, answer.prompt_tokens) == ("host", "native", 1 + 2 + 3)
    assert (answer.queue_s, answer.compute_s, answer.first_piece_s) == (3.0, 0.5, None)


def test_an_answer_has_the_time_to_its_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    request, ended = make_request(1)
    for now_s in (12.5, 14.0):
        monkeypatch.setattr("ranklet.replicas.engine.request.perf_counter", lambda now_s=now_s: now_s)
        request.send(0, ((1,), None))
    complete(request, 0, [1, 1, 1, 1])
    (answer,) = ended
    assert isinstance(answer, Answer)
    assert answer.first_piece_s == 2.5


def shortened(vector: list[float], *, normalize: bool) -> list[float]:
    wide = RequestLimits(max_model_len=10, hidden=33, vocab=100, max_embedding_len=10)
    ended: Ended = []
    task = EmbedTask(EmbedParams(32), 1, wide, HEAD, normalize=normalize)
    request = Request(task, [np.zeros(1, np.int32)], None, AnswerSink(ended.append))
    complete(request, 0, vector + [0.0] * (32 - len(vector)) + [12.0])
    (answer,) = ended
    assert isinstance(answer, Answer)
    assert answer.result.shape == (1, 32)
    values: list[float] = answer.result[0, : len(vector)].tolist()
    return values


def test_shortened_vectors_are_normalized_again() -> None:
    np.testing.assert_allclose(shortened([3.0, 4.0], normalize=True), [0.6, 0.8], rtol=1e-6)
    assert shortened([0.0, 0.0], normalize=True) == [0.0, 0.0]


def test_vectors_of_a_model_without_normalization_are_only_shortened() -> None:
    assert shortened([3.0, 4.0], normalize=False) == [3.0, 4.0]


def test_the_first_failure_ends_the_request_and_drops_its_other_sequences() -> None:
    request, ended = make_request(2)
    error = InternalError("no")
    request.fail(error)
    request.fail(InternalError("again"))
    complete(request, 0, [1, 1, 1, 1])
    complete(request, 1, [1, 1, 1, 1])
    assert ended == [error]
    assert all(sequence.cancelled for sequence in request.sequences)


def test_a_ticket_cancels_every_sequence() -> None:
    request, ended = make_request(3)
    Ticket(request).cancel()
    assert all(sequence.cancelled for sequence in request.sequences)
    assert ended == []


def test_a_sink_that_raises_does_not_disturb_the_engine() -> None:
    def careless(result: Any) -> None:
        raise RuntimeError("Event loop is closed")

    task = EmbedTask(EmbedParams(), 1, LIMITS, HEAD, normalize=True)
    request = Request(task, [np.zeros(1, np.int32)], None, AnswerSink(careless))
    assert complete(request, 0, [1, 0, 0, 0])
    assert not request.is_open
