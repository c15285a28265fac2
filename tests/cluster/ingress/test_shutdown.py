"""When a gateway ends its calls, by the health checks of Serve and by what its controller says."""

import asyncio
from collections.abc import Sequence

import pytest

from ranklet.cluster.ingress.shutdown import GatewayShutdown, ServeView
from tests.virtual_time import run_in_virtual_time

KEPT, STOPS = ServeView(False, 600.0, True), ServeView(True, 600.0, True)
Answer = ServeView | Exception | None


def ends_after(answers: Sequence[Answer], checks_s: int = 10) -> float | None:
    """Return how long after the last of `checks_s` health checks the calls end. None if not within an hour.

    Args:
        answers: of the controller, once health checks have ceased. The last one is repeated.
    """
    left = list(answers)
    checked = False

    async def look() -> ServeView | None:
        if not checked:
            return KEPT
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run() -> float | None:
        nonlocal checked
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        shutdown = GatewayShutdown(look, ended.set)
        running = asyncio.ensure_future(shutdown.run())
        for _ in range(checks_s):
            await asyncio.sleep(1)
            shutdown.on_health_check()
            assert not ended.is_set()
        checked, last_s = True, loop.time()
        try:
            async with asyncio.timeout(3600):
                await ended.wait()
            return loop.time() - last_s
        except TimeoutError:
            return None
        finally:
            running.cancel()

    return run_in_virtual_time(run())


def test_calls_end_seconds_before_serve_kills_the_gateway() -> None:
    """The time of a drain counts from the last health check: it cannot have begun before."""
    assert ends_after([STOPS]) == pytest.approx(595, abs=0.1)


def test_the_limit_of_a_new_version_does_not_hold_for_the_old_gateways() -> None:
    assert ends_after([ServeView(True, 5.0, False)]) == pytest.approx(595, abs=0.1)
    changing = ServeView(False, 5.0, False)
    assert ends_after([changing, STOPS]) == pytest.approx(595 + 3, abs=1)
    changed = ServeView(False, 60.0, True)
    assert ends_after([changed, ServeView(True, 7.0, False)]) == pytest.approx(55 + 3, abs=1)


def test_no_call_ends_while_serve_keeps_the_gateway_or_does_not_answer() -> None:
    """Nobody kills it then either."""
    answers: list[Answer] = [KEPT, None, ValueError("there is no controller")]
    for answer in answers:
        assert ends_after([answer]) is None


def test_calls_end_at_once_where_the_controller_answers_again_after_the_limit() -> None:
    silent: list[Answer] = [ValueError("there is no controller")] * 1000
    assert ends_after([*silent[:20], STOPS]) == pytest.approx(595, abs=0.1)
    late = ends_after([*silent, STOPS])
    assert late is not None
    assert late > 600


def test_a_short_limit_leaves_clients_a_third_of_it() -> None:
    kept = ServeView(False, 12.0, True)
    assert ends_after([kept, ServeView(True, 12.0, True)]) == pytest.approx(3 + 8, abs=1)
