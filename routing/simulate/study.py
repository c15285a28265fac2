"""What a user asks the simulation: rules side by side under one traffic."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from ranklet.routing.policy import Policy
from ranklet.routing.simulate import rules
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import Rule
from ranklet.routing.simulate.traffic import Traffic
from ranklet.routing.simulate.world import Setting, World

RULES: Mapping[str, Callable[[int, Policy], Rule]] = {
    "ranklet": rules.Ours,
    "power of two": lambda gateways, policy: rules.PowerOfTwo(),
    "Ray multiplex": lambda gateways, policy: rules.Multiplex(),
    "consistent hash": lambda gateways, policy: rules.ConsistentHash(),
    "round robin": lambda gateways, policy: rules.RoundRobin(),
    "least seen": rules.LeastSeen,
    "least loaded": lambda gateways, policy: rules.LeastLoaded(),
}


@dataclass(frozen=True, slots=True)
class Study:
    """One traffic on one cluster."""

    setting: Setting
    traffic: Traffic
    policy: Policy = field(default_factory=Policy)

    def run(self, rule: str) -> SimulationResult:
        """One rule of `RULES`."""
        made = RULES[rule](self.setting.gateways, self.policy)
        return World(self.setting, made, self.traffic, rule).run()

    def run_all(self, names: list[str], workers: int) -> Iterator[SimulationResult]:
        """Several, in processes of their own, as they end."""
        with ProcessPoolExecutor(min(workers, len(names))) as pool:
            for done in as_completed([pool.submit(self.run, name) for name in names]):
                yield done.result()


def rate_for(load: float, setting: Setting, tokens: int) -> float:
    """Requests a second that keep the replicas busy to `load`, a fraction, in large batches."""
    return load * setting.replicas * setting.speed.tokens_per_s / tokens
