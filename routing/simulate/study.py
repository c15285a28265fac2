"""Simulations of several routing rules with the same traffic."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from ranklet.routing.policy import Policy
from ranklet.routing.prefix import PAGE_TOKENS
from ranklet.routing.simulate import rules
from ranklet.routing.simulate.conversations import TextTraffic
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import Rule
from ranklet.routing.simulate.simulator import SimulatedCluster, Simulator
from ranklet.routing.simulate.text_engine import TextSpeed
from ranklet.routing.simulate.text_rules import AdapterOnly, PrefixOnly
from ranklet.routing.simulate.text_simulator import TextSimulator
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


TEXT_RULES: Mapping[str, Callable[[int, Policy], Rule]] = {
    "ranklet": rules.RankletRule,
    "least loaded": RULES["least loaded"],
    "power of two": RULES["power of two"],
    "prefix only": lambda gateways, policy: PrefixOnly(),
    "adapter only": AdapterOnly,
    "consistent hash": RULES["consistent hash"],
}


@dataclass(frozen=True, slots=True)
class Study:
    """Traffic on a cluster, simulated with one rule or several."""

    cluster: SimulatedCluster
    traffic: Traffic | TextTraffic
    policy: Policy = field(default_factory=Policy)

    def run(self, rule: str) -> SimulationResult:
        traffic = self.traffic
        if isinstance(traffic, TextTraffic):
            return TextSimulator(
                self.cluster, TEXT_RULES[rule](self.cluster.gateways, self.policy), traffic, rule
            ).run()
        return Simulator(self.cluster, RULES[rule](self.cluster.gateways, self.policy), traffic, rule).run()

    def run_all(self, names: list[str], workers: int) -> Iterator[SimulationResult]:
        """Simulate each rule in a process of its own. Yields each result as soon as it is ready."""
        with ProcessPoolExecutor(min(workers, len(names))) as pool:
            for done in as_completed([pool.submit(self.run, name) for name in names]):
                yield done.result()


def rate_for(load: float, cluster: SimulatedCluster, tokens: int) -> float:
    """Return the requests per second that keep replicas busy for a fraction `load` of the time, in large batches."""
    return load * cluster.replicas * cluster.speed.tokens_per_s / tokens


def text_rate_for(load: float, replicas: int, speed: TextSpeed, traffic: TextTraffic) -> float:
    """Return the texts per second that take a fraction `load` of the replicas' time.

    In full steps, and with each prompt but its question in the cache, as one infinite cache of all replicas would have
    nearly all of them.
    """
    new = traffic.question_tokens + PAGE_TOKENS / 2
    prompt_s = new * (1 + speed.attend * traffic.context_tokens) / speed.tokens_per_s
    return load * replicas / (prompt_s + speed.text_s(traffic.answer_tokens, traffic.context_tokens))
