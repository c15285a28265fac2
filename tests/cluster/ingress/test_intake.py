"""Large bodies take turns from parsing on, and nothing of a refused one stays."""

import asyncio
import gc
import threading
import weakref
from functools import partial

import pytest

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.intake import SMALL_BODY_BYTES, Intake
from ranklet.replicas.errors import InvalidRequest
from tests.cluster.ingress.parts import FakeTokenizer

LIMIT_BYTES = 8 << 20
LARGE_BYTES = 5 << 20


class HeldWork:
    """Work that blocks its thread until `end` is set. `begun` lists names in the order of their beginning."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.end = threading.Event()

    def run(self, name: str) -> str:
        self.begun.append(name)
        assert self.end.wait(60)
        return name


class HeldBody:
    """Stands for a large body."""


def refuse(body: HeldBody) -> None:
    raise InvalidRequest("no")


@pytest.fixture
def intake() -> Intake:
    return Intake(FakeTokenizer(), LimitsConfig(max_tokenising_bytes=LIMIT_BYTES))


async def test_bodies_are_worked_on_in_turns_by_key_and_within_the_bound(intake: Intake) -> None:
    work = HeldWork()
    names = ("a1", "a2", "a3", "b1")
    large = [asyncio.ensure_future(intake.in_turn(name[0], LARGE_BYTES, partial(work.run, name))) for name in names]
    async with asyncio.timeout(60):
        while not work.begun:  # noqa: ASYNC110  # a thread changes it
            await asyncio.sleep(0.001)
        for _ in range(10):
            assert await intake.in_turn("a", SMALL_BODY_BYTES, lambda: "small") == "small"
        assert work.begun == ["a1"], "two would exceed the bound"
        work.end.set()
        assert await asyncio.gather(*large) == list(names)
    assert work.begun == ["a1", "a2", "b1", "a3"]


async def test_a_body_whose_client_left_counts_until_its_thread_ends(intake: Intake) -> None:
    work = HeldWork()
    left = asyncio.ensure_future(intake.in_turn("a", LARGE_BYTES, partial(work.run, "left")))
    waits = asyncio.ensure_future(intake.in_turn("b", LARGE_BYTES, partial(work.run, "waits")))
    async with asyncio.timeout(60):
        while not work.begun:  # noqa: ASYNC110  # a thread changes it
            await asyncio.sleep(0.001)
        left.cancel()
        for _ in range(10):
            await intake.in_turn("b", 1, lambda: None)
        assert work.begun == ["left"]
        work.end.set()
        assert await waits == "waits"


@pytest.mark.parametrize("body_bytes", [1, LARGE_BYTES])
async def test_a_refused_body_is_free_before_the_next_garbage_collection(intake: Intake, body_bytes: int) -> None:
    body = HeldBody()
    kept, work = weakref.ref(body), partial(refuse, body)
    del body
    gc.disable()
    try:
        try:
            await intake.in_turn("a", body_bytes, work)
        except InvalidRequest:
            del work
        await asyncio.sleep(0)
        assert kept() is None
    finally:
        gc.enable()
