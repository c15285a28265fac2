"""The bound on what runs at once holds, and owners take turns."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.ingress.fair_budget import FairBudget

JOBS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 15)), max_size=20)


class JobRunner:
    """Runs jobs until the test ends each of them, and records the order in which they start."""

    def __init__(self, budget: FairBudget) -> None:
        self.budget = budget
        self.started: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, owner: str, weight: int) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.ensure_future(self._run(name, owner, weight))
        await settled()

    async def finish(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await settled()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settled()

    async def _run(self, name: str, owner: str, weight: int) -> None:
        async with self.budget.spend(owner, weight):
            self.started.append(name)
            await self._ends[name].wait()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@given(JOBS)
def test_the_bounds_hold_and_every_job_runs(jobs: list[tuple[str, int]]) -> None:
    async def run() -> None:
        budget = FairBudget(limit=10, jobs=3)
        running: list[int] = []

        async def job(owner: str, weight: int) -> None:
            async with budget.spend(owner, weight):
                running.append(weight)
                assert len(running) <= 3
                assert sum(running) <= 10 or len(running) == 1
                await asyncio.sleep(0)
                running.remove(weight)

        async with asyncio.timeout(30):
            await asyncio.gather(*(job(owner, weight) for owner, weight in jobs))
        assert budget.used == 0

    asyncio.run(run())


async def test_owners_take_turns_and_keep_their_own_order() -> None:
    runner = JobRunner(FairBudget(limit=10, jobs=1))
    for name in ("a1", "a2", "a3", "b1", "b2"):
        await runner.start(name, name[0], 1)
    for name in ("a1", "a2", "b1", "a3", "b2"):
        await runner.finish(name)
    assert runner.started == ["a1", "a2", "b1", "a3", "b2"]


async def test_one_owner_leaves_half_of_the_limit_to_others() -> None:
    runner = JobRunner(FairBudget(limit=10, jobs=8))
    await runner.start("a1", "a", 4)
    await runner.start("a2", "a", 4)
    assert runner.started == ["a1"]
    await runner.start("b1", "b", 4)
    assert runner.started == ["a1", "b1"], "another owner does not wait behind a's queue"
    await runner.finish("a1")
    assert runner.started == ["a1", "b1", "a2"]


async def test_a_job_above_the_limit_runs_by_itself_and_is_not_passed_for_ever() -> None:
    runner = JobRunner(FairBudget(limit=10, jobs=8))
    await runner.start("b1", "b", 2)
    await runner.start("a1", "a", 50)
    await runner.start("c1", "c", 1)
    assert runner.started == ["b1"], "c1 waits for a1, which was first"
    await runner.finish("b1")
    assert runner.started == ["b1", "a1"]
    await runner.finish("a1")
    assert runner.started == ["b1", "a1", "c1"]


@pytest.mark.parametrize("cancelled", ["waiting", "running"])
async def test_a_cancelled_job_gives_its_weight_back(cancelled: str) -> None:
    runner = JobRunner(FairBudget(limit=10, jobs=8))
    await runner.start("running", "a", 8)
    await runner.start("waiting", "b", 8)
    await runner.start("last", "c", 8)
    await runner.cancel(cancelled)
    await runner.finish("waiting" if cancelled == "running" else "running")
    assert runner.started[-1] == "last"
    await runner.finish("last")
    assert runner.budget.used == 0
