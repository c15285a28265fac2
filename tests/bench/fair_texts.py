"""Texts and embeddings of steady adapters while one other adapter is flooded, on a simulated device.

Or of steady API keys of one adapter, while another key floods it: both share an engine in the same way.

The scheduler and the queue are those of an engine; a step takes the time that `StepCost` says, scaled to an H200. The
steady ones get single requests at Poisson times, together at a share of the capacity, which is measured first. The
flood keeps requests waiting, of long answers or of embeddings. So the numbers show what the order and the mix of steps
do, and nothing of the host.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, cast

import numpy as np
from torch import Tensor

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.forecast import Forecast
from ranklet.replicas.engine.launched import LaunchedStep, OutputGroup
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.engine.step_sizes import gpu_sizes
from ranklet.replicas.model.heads import Head
from tests.bench import report
from tests.bench.shapes import QWEN3_06B
from tests.replicas.engine.simulated_device import LAST, TEXT, VOCAB
from tests.replicas.engine.simulation import Simulation

_OTHERS = 16
_SHARES = ("adapters", "keys")
_FLOOD_DEPTH = 4  # requests of the flood, for each text that the engine runs at once
_PAGES = 12_000
_TOKENS = range(2, VOCAB)
_STEP_S, _STEP_TEXTS, _STEP_CONTEXT = 4.3e-3, 256, 288  # a step of an H200 in decode-step-h200.json


@dataclass(frozen=True)
class Kind:
    """A request.

    Attributes:
        outputs: tokens of its text; 0 of embeddings.
        system: tokens before the prompt that all requests for an adapter begin with.
    """

    prompt: int
    outputs: int = 0
    system: int = 0


STEADY = {"texts": Kind(512, 128), "embeddings": Kind(512)}
FLOODS = {"none": None, "long answers": Kind(128, 1024), "embeddings": Kind(512)}


class TimedDevice:
    """Gives every sequence an output that ends no text, and computes nothing."""

    def __init__(self, slots: int) -> None:
        self.contents: list[AdapterRef | None] = [None] * slots

    def launch(self, plan: StepPlan, slots: Sequence[int | None], *, fails: bool) -> LaunchedStep:
        outputs: dict[Any, list[tuple[int, Any]]] = {TEXT: [], LAST: []}
        outputs[TEXT] = [(item, 1) for item in range(len(plan.decodes))]
        for index, part in enumerate(plan.parts, len(plan.decodes)):
            if part.head is not None:
                outputs[part.head].append((index, 1 if cast(Any, part.head) is TEXT else np.ones(1, np.float32)))
        groups = [
            OutputGroup(cast(Head, head), [item for item, _ in found], (cast(Tensor, [each for _, each in found]),))
            for head, found in outputs.items()
            if found
        ]
        return LaunchedStep(groups, "none", 0.0, 0.0, None)


@dataclass(eq=False)
class Timed:
    """When the outputs of one request came."""

    due_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


class Run:
    """An engine on the simulated device, with a clock of its own.

    Args:
        unit_s: seconds of a unit of `costs`.
        share: whether flows differ by their adapter or by their key.
        adapters: number of adapters.
        has_prefix_cache: whether prompts that begin alike share their pages.
        gathers: whether texts that wait for rows start together.
    """

    def __init__(
        self, costs: StepCost, rows: int, unit_s: float, share: str = "adapters", adapters: int = _OTHERS + 1, *,
        has_prefix_cache: bool = False, gathers: bool = True,
    ) -> None:  # fmt: skip
        self._gathers = gathers
        self.costs, self.rows, self._unit_s = costs, rows, unit_s
        self._by_key = share == "keys"
        self.refs = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(adapters)]
        self.engine = Simulation(
            pages=_PAGES, rows=rows, slots=len(self.refs), max_tokens=8192, max_adapters=len(self.refs),
            max_model_len=4096, costs=self.costs, slowdown=1.8, depth=2, shares_prefixes=has_prefix_cache,
        )  # fmt: skip
        self.engine.device = cast(Any, TimedDevice(len(self.refs)))
        self.engine.load(self.refs)
        self.now_s = self._free_s = 0.0
        self._forecast = Forecast()
        self._ends: deque[tuple[float, float]] = deque()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._draw = random.Random(1)

    def at(self, due_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (due_s, next(self._number), call))

    def send(self, kind: Kind, flow: int, done: Callable[[Timed], None], due_s: float | None = None) -> None:
        ref, key_name = (self.refs[0], f"key{flow}") if self._by_key else (self.refs[flow], "")
        timed = Timed(self.now_s if due_s is None else due_s)
        prompt = (
            [1] * kind.prompt if not kind.system else [1] * kind.system + self._draw.choices(_TOKENS, k=kind.prompt)
        )
        if kind.outputs:
            outputs = self._draw.randint(kind.outputs // 2, kind.outputs * 3 // 2)
            asked = self.engine.generate([prompt], ref, max_tokens=outputs, key_name=key_name)
        else:
            asked = self.engine.embed([prompt], ref, key_name=key_name)
        self.engine.asked.clear()
        last_s = 0.0

        def delta(index: int, piece: Any) -> None:
            nonlocal last_s
            if timed.tokens:
                timed.gaps.append(self.now_s - last_s)
            else:
                timed.first_s = self.now_s
            last_s = self.now_s
            timed.tokens += len(piece[0])

        def end(result: Any) -> None:
            timed.end_s = self.now_s
            done(timed)

        vars(asked).update(delta=delta, done=end)

    def until(self, end_s: float) -> None:
        while self.now_s < end_s:
            while self._due and self._due[0][0] <= self.now_s:
                heapq.heappop(self._due)[2]()
            self._set_sizes()
            while (plan := self.engine.step()) is not None:
                if plan.computes:
                    device_s = self._cost(plan) * self._unit_s
                    self._free_s = max(self._free_s, self.now_s) + device_s
                    self._ends.append((self._free_s, device_s))
                    self._forecast.on_launch(None if plan.uses_pages else plan.tokens, self.now_s)
                    self._set_sizes()
            if self._ends:
                self.now_s, device_s = self._ends.popleft()
                self._forecast.on_finish(device_s, self.now_s)
                self.engine.deliver()
            elif self._due:
                self.now_s = max(self.now_s, self._due[0][0])
            else:
                return

    def _set_sizes(self) -> None:
        self.engine.scheduler.set_sizes(gpu_sizes(self._forecast)._replace(gathers=self._gathers))

    def _cost(self, plan: StepPlan) -> float:
        costs, decodes = self.costs, plan.decodes
        total = costs.decodes(len(decodes), sum(each.computed for each in decodes)) if decodes else costs.step
        total += costs.mixed if decodes and plan.parts else 0.0
        return total + sum(costs.piece(part.tokens, part.start) for part in plan.parts)


def _flood(run: Run, kind: Kind | None) -> list[Timed]:
    ended: list[Timed] = []
    if kind is None:
        return ended

    def again(timed: Timed) -> None:
        ended.append(timed)
        run.send(kind, 0, again)

    for _ in range(_FLOOD_DEPTH * run.rows):
        run.send(kind, 0, again)
    return ended


def capacity(make: Callable[[], Run], kind: Kind, seconds: float) -> float:
    """Return requests per second that are answered while many wait."""
    run, ended, number = make(), list[Timed](), count()

    def again(timed: Timed | None = None) -> None:
        if timed is not None:
            ended.append(timed)
        run.send(kind, 1 + next(number) % _OTHERS, again)

    for _ in range(2 * run.rows):
        again()
    run.until(seconds)
    return sum(each.end_s > seconds / 3 for each in ended) / (seconds * 2 / 3)


def steady(run: Run, kind: Kind, rate: float, seconds: float) -> list[Timed]:
    """Send `rate` requests per second of the steady flows. Returns those due after the first third."""
    draw, ended = random.Random(0), list[Timed]()
    sent, due_s = 0, 0.0
    while due_s < seconds:
        run.at(due_s, partial(run.send, kind, draw.randint(1, _OTHERS), ended.append, due_s))
        due_s += draw.expovariate(rate)
        sent += 1
    run.until(seconds)
    while len(ended) < sent:
        run.until(run.now_s + 1.0)
    return [each for each in ended if each.due_s > seconds / 3]


def h200_costs() -> tuple[StepCost, float]:
    """Return what steps of Qwen3-0.6B cost, and the seconds of a unit on an H200."""
    costs = StepCost.of(QWEN3_06B)
    return costs, _STEP_S / costs.decodes(_STEP_TEXTS, _STEP_TEXTS * _STEP_CONTEXT)


def measure(share: str, steady_name: str, rows: int, load: float, seconds: float) -> list[dict[str, Any]]:
    costs, unit_s = h200_costs()

    def make() -> Run:
        return Run(costs, rows, unit_s, share)

    kind = STEADY[steady_name]
    most = capacity(make, kind, seconds / 2)
    made: list[dict[str, Any]] = []
    for name, flood in FLOODS.items():
        run = make()
        flooded = _flood(run, flood)
        others = steady(run, kind, load * most, seconds)
        waits = [1e3 * ((each.first_s if kind.outputs else each.end_s) - each.due_s) for each in others]
        gaps = [1e3 * gap for each in others for gap in each.gaps]
        late = [each for each in flooded if each.end_s > seconds / 3]
        made.append({
            "share": share, "steady": steady_name, "load": load, "rows": rows, "flood": name, "capacity_per_s": most,
            "requests": len(others), "flood_per_s": len(late) / (seconds * 2 / 3),
            "preemptions": run.engine.scheduler.preemptions,
            **_points("wait", waits), **_points("gap", gaps),
        })  # fmt: skip
    first = made[0]
    ratios = {"wait ratio": "wait_p99_ms", "gap p50 ratio": "gap_p50_ms", "gap p99 ratio": "gap_p99_ms"}
    return [
        {**row, **{ratio: row[name] / first[name] if row[name] is not None else None for ratio, name in ratios.items()}}
        for row in made
    ]


def _points(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {f"{name}_p{point}_ms": float(np.percentile(values, point)) if values else None for point in (50, 99)}


def main() -> None:
    parser = report.parser(__doc__, "fair-texts-simulated")
    parser.add_argument("--share", nargs="+", default=list(_SHARES), choices=_SHARES, help="what flows differ by")
    parser.add_argument("--steady", nargs="+", default=list(STEADY), choices=STEADY)
    parser.add_argument("--rows", type=int, default=256, help="texts that run at once")
    parser.add_argument("--load", type=float, default=0.8, help="steady traffic's share of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated length of each measurement")
    options = parser.parse_args()
    rows = [
        row
        for share in options.share
        for name in options.steady
        for row in measure(share, name, options.rows, options.load, options.seconds)
    ]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
