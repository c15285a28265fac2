"""Simulations of several routing rules with the same traffic."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from ranklet.routing.policy import Policy
from ranklet.routing.simulate import rules
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import Rule
from ranklet.routing.simulate.simulator import SimulatedCluster, Simulator
from ranklet.routing.simulate.traffic import Traffic

RULES: Mapping[str, Callable[[int, Policy], Rule]] = {
    "ranklet": rules.RankletRule,
    "power of two": lambda gateways, policy: rules.PowerOfTwo(),
    "Ray multiplex": lambda gateways, policy: rules.Multiplex(),
    "consistent hash": lambda gateways, policy: rules.ConsistentHash(),
    "round robin": lambda gateways, policy: rules.RoundRobin(),
    "least seen": rules.LeastSeen,
    "least loaded": lambda gateways, policy: rules.LeastLoaded(),
}


@dataclass(frozen=True, slots=True)
class Study:
    """Traffic on a cluster, simulated with one rule or several."""

    cluster: SimulatedCluster
    traffic: Traffic
    policy: Policy = field(default_factory=Policy)

    def run(self, rule: str) -> SimulationResult:
        made = RULES[rule](self.cluster.gateways, self.policy)
        return Simulator(self.cluster, made, self.traffic, rule).run()

    def run_all(self, names: list[str], workers: int) -> Iterator[SimulationResult]:
        """Simulate each rule in a process of its own. Yields each result as soon as it is ready."""
        with ProcessPoolExecutor(min(workers, len(names))) as pool:
            for done in as_completed([pool.submit(self.run, name) for name in names]):
                yield done.result()


def rate_for(load: float, cluster: SimulatedCluster, tokens: int) -> float:
    """Return the requests per second that keep replicas busy for a fraction `load` of the time, in large batches."""
    return load * cluster.replicas * cluster.speed.tokens_per_s / tokens
