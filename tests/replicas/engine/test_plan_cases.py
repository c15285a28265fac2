"""Cases of the planner that random requests reach rarely: each once stopped the engine or changed a text."""

from ranklet.replicas.adapters.reference import AdapterRef
from tests.replicas.engine.simulated_device import expected_text
from tests.replicas.engine.simulation import Simulation

ONE, TWO = AdapterRef("one", "/one", "one-1"), AdapterRef("two", "/two", "two-1")


def simulation(pages: int, *, rows: int = 4, slots: int = 1, max_tokens: int = 320, depth: int = 1) -> Simulation:
    return Simulation(
        pages=pages, rows=rows, slots=slots, max_tokens=max_tokens, max_adapters=slots, max_model_len=320,
        depth=depth,
    )  # fmt: skip


def finish(running: Simulation) -> None:
    running.run(2_000)
    running.check()
    for asked in running.asked:
        asked.check()
    assert running.space.pool.used == 0


def lasting(length: int, tokens: int, adapter: AdapterRef | None = None) -> list[int]:
    """Return a prompt whose text has at least this many tokens."""
    return next(
        prompt
        for letter in range(1, 40)
        for last in range(1, 40)
        if len(expected_text(prompt := [letter] * (length - 1) + [last], adapter, tokens)) == tokens
    )


def test_a_text_with_a_grammar_is_in_every_second_step_and_others_in_each() -> None:
    running = simulation(12, depth=2)
    bound = running.generate([lasting(20, 30)], max_tokens=30, has_grammar=True).request.sequences[0]
    free = running.generate([lasting(30, 60)], max_tokens=60).request.sequences[0]
    running.step()
    taken = []
    for _ in range(20):
        plan = running.step()
        assert plan is not None
        assert free in plan.decodes
        taken.append(bound in plan.decodes)
        running.deliver()
        while running.masks:
            running.end_mask()
    assert taken == [False, True] * 10
    finish(running)


def test_requests_with_equal_prompts_start_in_one_step() -> None:
    running = simulation(12)
    for _ in range(3):
        running.generate([[1] * 200], max_tokens=5)
    finish(running)


def test_cached_pages_that_a_sequence_shares_are_not_evicted_for_others_of_the_same_step() -> None:
    running = simulation(6)
    running.generate([[1] * 129], max_tokens=1)
    finish(running)
    running.generate([[2] * 200], max_tokens=1)
    running.generate([[1] * 129], max_tokens=1)
    finish(running)


def test_a_prompt_that_waits_for_pages_does_not_block_the_sequence_that_holds_them() -> None:
    running = simulation(5, rows=2, max_tokens=64)
    running.generate([lasting(64, 5)], max_tokens=5)
    running.embed([[1] * 129])
    running.embed([[1] * 65])
    finish(running)


def test_a_sequence_that_runs_alone_waits_for_the_pages_of_a_decode() -> None:
    running = simulation(5)
    running.generate([[1] * 204], max_tokens=3)
    running.generate([[2] * 6], max_tokens=3)
    running.step(fails=True)
    running.deliver()
    finish(running)


def test_the_victim_of_a_decode_is_not_in_the_step() -> None:
    """The longer prompt starts first, and decodes last: its page is taken from the other one."""
    running = simulation(5, max_tokens=100)
    running.embed([[1]], ONE)
    finish(running)
    running.generate([lasting(130, 70)], max_tokens=70)
    running.generate([lasting(20, 100, ONE)], ONE, max_tokens=100)
    finish(running)
    assert running.scheduler.preemptions == 1


def test_a_last_token_that_was_computed_from_the_pages_of_a_failed_step_is_not_delivered() -> None:
    running = simulation(12, depth=2, max_tokens=100)
    running.generate([[1] * 70], max_tokens=1)
    running.step(fails=True)
    running.generate([[1] * 70], max_tokens=1)
    running.step()
    running.deliver()
    running.run(100)
    running.asked[1].check()


def test_a_preempted_sequence_returns_to_its_place() -> None:
    running = simulation(12, rows=1)
    running.generate([[1] * 6], max_tokens=5)
    running.generate([[2] * 6], max_tokens=5)
    running.step()
    running.deliver()
    running.preempt_all()
    first, second = running.scheduler.queue
    assert first.request is running.asked[0].request
    assert second.request is running.asked[1].request
    finish(running)


def test_an_adapter_that_is_wanted_again_while_it_retires_is_used_at_once() -> None:
    running = simulation(12)
    running.generate([[1]], ONE, max_tokens=5)
    running.step()
    running.end_load()
    running.step()
    running.generate([[1]], TWO, max_tokens=1)
    running.deliver()
    running.step()
    running.deliver()
    assert running.slots.usable(ONE) is None, "it retires"
    running.preempt_all()
    assert running.step() is not None
    finish(running)
