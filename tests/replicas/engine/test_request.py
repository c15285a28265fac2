"""A request gathers its prompts in order, ends once, and drops the rest when one fails."""

from collections.abc import Sequence

import numpy as np

from ranklet.replicas.engine.request import Answer, Prompt, Request, Ticket
from ranklet.replicas.errors import InternalError, RankletError


def call(prompts: int, dimensions: int = 4, *, shortened: bool = False) -> tuple[Request, list[Answer | RankletError]]:
    ended: list[Answer | RankletError] = []
    made = Request(prompts, dimensions, shortened=shortened, tier="host", tokens=7, done=ended.append)
    made.works = [Prompt(np.zeros(1, np.int32), None, 0.0, call=made, index=index) for index in range(prompts)]
    return made, ended


def complete(made: Request, index: int, vector: Sequence[float], *, waited: float = 0.0, ran: float = 0.0) -> None:
    made.complete(index, np.asarray(vector, np.float32), backend="native", queue_s=waited, compute_s=ran)


def test_vectors_stand_in_the_order_of_the_prompts() -> None:
    made, ended = call(3)
    for index in (2, 0, 1):
        assert not ended
        complete(made, index, [index, 1, 2, 3], waited=1.0 + index, ran=0.5 - 0.1 * index)
    (answer,) = ended
    assert isinstance(answer, Answer)
    assert answer.vectors[:, 0].tolist() == [0, 1, 2]
    assert (answer.tier, answer.backend, answer.prompt_tokens) == ("host", "native", 7)
    assert (answer.queue_s, answer.compute_s) == (3.0, 0.5)


def test_shortened_vectors_have_length_one_again() -> None:
    made, ended = call(2, dimensions=2, shortened=True)
    complete(made, 0, [3.0, 4.0, 12.0])
    complete(made, 1, [0.0, 0.0, 1.0])
    (answer,) = ended
    assert isinstance(answer, Answer)
    np.testing.assert_allclose(answer.vectors, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_unnormalised_models_are_only_cut() -> None:
    made, ended = call(1, dimensions=2)
    complete(made, 0, [3.0, 4.0, 12.0])
    (answer,) = ended
    assert isinstance(answer, Answer)
    assert answer.vectors.tolist() == [[3.0, 4.0]]


def test_the_first_failure_ends_the_request_and_drops_its_other_prompts() -> None:
    made, ended = call(2)
    error = InternalError("no")
    made.fail(error)
    made.fail(InternalError("again"))
    complete(made, 0, [1, 1, 1, 1])
    complete(made, 1, [1, 1, 1, 1])
    assert ended == [error]
    assert all(work.cancelled for work in made.works)


def test_a_ticket_cancels_every_prompt() -> None:
    made, ended = call(3)
    Ticket(made).cancel()
    assert all(work.cancelled for work in made.works)
    assert ended == []
