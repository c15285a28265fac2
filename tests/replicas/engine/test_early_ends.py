"""Texts that a client needs no more of end within two steps, and free their pages."""

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.request import Answer, Ticket
from tests.replicas.engine.simulation import Asked, Simulation
from tests.replicas.engine.test_plan_cases import lasting

TOKENS = 30


def simulation(depth: int, *, pages: int = 12, rows: int = 4, max_tokens: int = 320) -> Simulation:
    return Simulation(
        pages=pages, rows=rows, slots=1, max_tokens=max_tokens, max_adapters=1, max_model_len=320, depth=depth
    )  # fmt: skip


def run_steps(running: Simulation, steps: int) -> None:
    for _ in range(steps):
        while running.step() is not None:
            pass
        running.deliver()


def generation_of(asked: Asked) -> Generation:
    assert isinstance(asked.result, Answer)
    assert isinstance(asked.result.result, Generation)
    return asked.result.result


@pytest.mark.parametrize("depth", [1, 2])
def test_a_running_text_has_at_most_two_tokens_after_its_end_is_asked(depth: int) -> None:
    running = simulation(depth)
    asked, beside = (running.generate([lasting(length, TOKENS)], max_tokens=TOKENS) for length in (10, 20))
    run_steps(running, 4)
    before = len(asked.pieces[0])
    while running.step() is not None:
        pass
    Ticket(asked.request).finish(0)
    running.deliver()
    (choice,) = generation_of(asked).choices
    assert before < len(choice.tokens) <= before + 2
    assert (choice.finish_reason, choice.stop_token) == ("stop", None)
    assert asked.pieces[0] == choice.tokens.tolist()
    running.check()
    assert asked.request.sequences[0].row is None
    running.run(100)
    beside.check()
    assert running.space.pool.used == 0


def test_only_the_named_text_of_a_request_ends() -> None:
    running = simulation(2)
    prompts = [lasting(10, TOKENS), lasting(20, TOKENS)]
    asked = running.generate(prompts, max_tokens=TOKENS)
    run_steps(running, 4)
    asked.request.finish(1)
    asked.request.finish(2)  # there is none
    running.run(100)
    first, second = generation_of(asked).choices
    assert (len(first.tokens), first.finish_reason) == (TOKENS, "length")
    assert len(second.tokens) < 8


def test_a_preempted_text_ends_with_its_next_token() -> None:
    running = simulation(1)
    asked = running.generate([lasting(10, TOKENS)], max_tokens=TOKENS)
    run_steps(running, 4)
    before = len(asked.pieces[0])
    running.preempt_all()
    asked.request.finish(0)
    run_steps(running, 1)
    (choice,) = generation_of(asked).choices
    assert len(choice.tokens) == before + 1
    assert running.space.pool.used == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_cancelled_text_frees_its_pages_within_two_steps(depth: int) -> None:
    running = simulation(depth)
    asked, beside = (running.generate([lasting(length, TOKENS)], max_tokens=TOKENS) for length in (10, 20))
    run_steps(running, 4)
    while running.step() is not None:
        pass
    asked.request.cancel()
    for _ in range(2):
        running.deliver()
        while running.step() is not None:
            pass
    assert asked.request.sequences[0].row is None
    assert beside.request.sequences[0].row is not None
    running.check()
    running.run(100)
    beside.check()
    assert running.space.pool.used == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("state", ["queued", "loading", "prefilling", "decoding"])
def test_a_text_that_is_cancelled_in_any_state_holds_nothing_after_two_steps(state: str, depth: int) -> None:
    running = simulation(depth, rows=1 if state == "queued" else 4, max_tokens=64)
    beside = running.generate([lasting(20, TOKENS)], max_tokens=TOKENS)
    adapter = AdapterRef("one", "/one", "one-1") if state == "loading" else None
    length = 10 if state == "decoding" else 200
    asked = running.generate([lasting(length, TOKENS, adapter)], adapter, max_tokens=TOKENS)
    run_steps(running, 4 if state == "decoding" else 1)
    while running.step() is not None:
        pass
    (sequence,) = asked.request.sequences
    assert bool(running.loading) == (state == "loading")
    assert (sequence.row is not None) == (state in ("prefilling", "decoding"))
    assert bool(asked.pieces) == (state == "decoding")
    asked.request.cancel()
    for _ in range(2):
        running.deliver()
        while running.step() is not None:
            pass
    assert sequence.row is None
    assert not sequence.holds_slot
    assert sequence not in running.scheduler.queue
    running.check()
    pieces = {index: list(tokens) for index, tokens in asked.pieces.items()}
    running.run(100)
    beside.check()
    assert (asked.result, asked.pieces) == (None, pieces)
    assert running.space.pool.used == 0
