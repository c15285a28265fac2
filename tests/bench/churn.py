"""Load, replace and unload adapters thousands of times on a CPU, check every answer, and track memory.

Each cycle changes one adapter while clients send requests to all of them. An answer must come from a revision that was
served at some moment between request and answer. 404 is correct only if no revision was served at some moment.
"""

import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

from tests.assets.cache import make_once
from tests.bench import report
from tests.cluster.nodes import command_line, process_tree
from tests.cluster.service import Service, Vectors, local_configuration, serving, vectors_of

TEXT = "Notice must be given in writing."
SOURCES = ("legal-v2", "medical")
_SAMPLES = 100  # memory samples
_SETTLED = 0.2  # share of the cycles before memory is compared


@dataclass
class History:
    """Revisions served under one name as (from, until, source or None). Neighbours overlap while a call runs."""

    spans: list[tuple[float, float, str | None]] = field(default_factory=lambda: [(0.0, float("inf"), None)])
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> str | None:
        return self.spans[-1][2]

    def start_change(self, source: str | None) -> None:
        """Start a span before the call that changes the adapter is sent."""
        with self.lock:
            self.spans.append((time.monotonic(), float("inf"), source))

    def finish_change(self) -> None:
        """End the previous span once the call is answered."""
        with self.lock:
            since, _, source = self.spans[-2]
            self.spans[-2] = (since, time.monotonic(), source)
            del self.spans[:-16]

    def during(self, since_s: float, until_s: float) -> set[str | None]:
        with self.lock:
            return {source for first, last, source in self.spans if first <= until_s and last >= since_s}


class Churn:
    """Changes adapters of a service and checks its answers."""

    def __init__(self, service: Service, names: int) -> None:
        self._service = service
        self._names = {f"churn{number}": History() for number in range(names)}
        self._expected: dict[str, Vectors] = {name: service.embed(name, TEXT) for name in SOURCES}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._random = random.Random(0)

    def cycle(self, http: httpx.Client) -> None:
        name, history = self._random.choice(list(self._names.items()))
        if history.now is not None and self._random.random() < 0.5:
            history.start_change(None)
            answer = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            self.counts["unload"] += 1
        else:
            source = self._random.choice([each for each in SOURCES if each != history.now])
            self.counts["load" if history.now is None else "replace"] += 1
            history.start_change(source)
            body = {
                "lora_name": name,
                "lora_path": f".sources/{source}",
                "load_inplace": history.spans[-2][2] is not None,
            }
            answer = http.post("/v1/load_lora_adapter", json=body)
        history.finish_change()
        if answer.status_code != 200:
            raise RuntimeError(f"{name}: {answer.text}")

    def send(self, stop: threading.Event, seed: int) -> None:
        """Send requests for random names and check each answer, until `stop` is set."""
        dice = random.Random(seed)
        with httpx.Client(base_url=self._service.url, timeout=60, trust_env=False) as http:
            while not stop.is_set():
                name, history = dice.choice(list(self._names.items()))
                sent_s = time.monotonic()
                body = {"model": name, "input": TEXT, "encoding_format": "base64"}
                answer = http.post("/v1/embeddings", json=body)
                allowed = history.during(sent_s, time.monotonic())
                self._judge(name, answer, allowed)

    def _judge(self, name: str, answer: httpx.Response, allowed: set[str | None]) -> None:
        if answer.status_code == 200:
            vector = vectors_of(answer)
            found = [source for source, known in self._expected.items() if np.abs(vector - known).max() < 1e-5]
            right = bool(found) and found[0] in allowed
            self.counts["answered"] += 1
        else:
            right = answer.status_code == 404 and None in allowed
            self.counts["refused, there was none"] += right
        if not right:
            self.wrong.append(f"{name}: {answer.status_code}, allowed {allowed}: {answer.text[:200]}")


def resident_mb(service: Service) -> dict[str, float]:
    found = {"gateways": 0.0, "replicas": 0.0, "engines": 0.0}
    for role, deployment in (("gateways", "Gateway"), ("replicas", "Replica")):
        for pid in service.processes(deployment).values():
            for each in process_tree(pid):
                pages = Path(f"/proc/{each}/statm").read_text().split()[1]
                inside = "engines" if "ranklet.replicas.process.worker" in command_line(each) else role
                found[inside] += int(pages) * 4096 / 1e6
    return found


def run(service: Service, cycles: int, names: int, clients: int) -> list[dict[str, Any]]:
    churn, stop = Churn(service, names), threading.Event()
    asking = [threading.Thread(target=churn.send, args=(stop, seed)) for seed in range(clients)]
    for each in asking:
        each.start()
    sampled: list[tuple[int, dict[str, float]]] = []
    began_s = time.monotonic()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            for done in progress.track(range(cycles), description="cycles"):
                churn.cycle(service.http)
                if done % max(cycles // _SAMPLES, 1) == 0:
                    sampled.append((done, resident_mb(service)))
    finally:
        stop.set()
        for each in asking:
            each.join()
    seconds = time.monotonic() - began_s
    counted = [found for done, found in sampled if done >= _SETTLED * cycles]
    tenth = max(len(counted) // 10, 1)
    rows: list[dict[str, Any]] = []
    for role in counted[0]:
        first = sum(found[role] for found in counted[:tenth]) / tenth
        last = sum(found[role] for found in counted[-tenth:]) / tenth
        middle = counted[len(counted) // 2][role]
        rows.append({
            "what": f"memory of {role}, MB", "first": first, "middle": middle, "last": last, "grown": last / first - 1,
        })  # fmt: skip
    rows += [{"what": what, "count": count} for what, count in sorted(churn.counts.items())]
    rows += [{"what": "wrong", "count": len(churn.wrong)}, {"what": "seconds", "count": round(seconds)}]
    for line in churn.wrong[:5]:
        Console(stderr=True).print(line, markup=False)
    return rows


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--cycles", type=int, default=10_000, help="changes of an adapter")
    parser.add_argument("--names", type=int, default=12, help="adapters that change")
    parser.add_argument("--clients", type=int, default=2, help="threads that send requests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = make_once(folder / "made")
        for name in SOURCES:
            shutil.copytree(made / "adapters" / name, made / "adapters" / ".sources" / name)
        with serving(local_configuration(made / "model", made / "adapters"), folder) as service:
            found = run(service, options.cycles, options.names, options.clients)
    report.save("churn-cpu", found, options.out)


if __name__ == "__main__":
    main()
