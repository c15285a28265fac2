"""Stream texts while engines and replicas die, hang, drain and change, and count the streams that are not right.

Two replicas and two gateways on this machine keep 64 streams open, greedy and sampled, of the base model and adapters.
Each stream must have the tokens, the text and the usage of the same request without faults.
"""

import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranklet.cluster.command.local_cluster import LocalCluster
from tests.bench import report
from tests.cluster.nodes import engine_process
from tests.cluster.service import BASE, Service, eventually, serving, text_configuration
from tests.cluster.stream_load import StreamLoad, stream_requests

_SETTLE_S = 3.0  # under load before a fault


class Faults:
    """What happens to the replicas of a service; each method returns when two serve again."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._slots = 8

    def all(self) -> dict[str, Callable[[], None]]:
        return {
            "engine killed": self.engine_killed, "replica killed": self.replica_killed,
            "engine hangs": self.engine_hangs, "replica hangs": self.replica_hangs,
            "replica drained": self.drained, "all processes redeployed": self.redeployed,
        }  # fmt: skip

    def engine_killed(self) -> None:
        self._signal(signal.SIGKILL, of_engine=True)

    def replica_killed(self) -> None:
        self._signal(signal.SIGKILL, of_engine=False)

    def engine_hangs(self) -> None:
        self._signal(signal.SIGSTOP, of_engine=True)

    def replica_hangs(self) -> None:
        self._signal(signal.SIGSTOP, of_engine=False)

    def drained(self) -> None:
        """Take one replica away, whose streams outlast its graceful shutdown, and bring one back."""
        before = self._replicas()
        for count in (1, 2):
            self._service.scale("Replica", count)
            eventually(f"{count} replicas", lambda count=count: len(self._replicas()) == count)  # type: ignore[misc]
        eventually("another replica", lambda: len(set(self._replicas()) - set(before)) == 1)

    def redeployed(self) -> None:
        """Replace all processes of the application one after the other, gateways too."""
        before = {*self._replicas(), *self._service.processes("Gateway")}
        self._slots += 1
        self._service.content["applications"][0]["args"]["engine"]["slots"] = self._slots
        self._service.deploy(None)

        def are_new() -> bool:
            now = {*self._replicas(), *self._service.processes("Gateway")}
            return len(now) == 4 and not before & now

        eventually("all processes are new", are_new)

    def _replicas(self) -> dict[str, int]:
        return self._service.processes("Replica")

    def _signal(self, kind: signal.Signals, *, of_engine: bool) -> None:
        id, actor = next(iter(self._replicas().items()))
        pid = engine_process(actor) if of_engine else actor
        os.kill(pid, kind)
        try:
            eventually("another replica", lambda: id not in self._replicas())
            eventually("two replicas", lambda: len(self._replicas()) == 2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def configuration(folder: Path) -> dict[str, Any]:
    content = text_configuration(folder)
    application = content["applications"][0]
    gateway, replica = application["deployments"]
    gateway["num_replicas"] = 2
    replica["graceful_shutdown_timeout_s"] = 2
    return content


def measure(load: StreamLoad, service: Service, name: str, fault: Callable[[], object], streams: int) -> dict[str, Any]:
    """Keep streams open around a fault."""
    load.clear()
    gateways, before = set(service.processes("Gateway")), continuations(service)
    with load.running(streams):
        time.sleep(_SETTLE_S)
        began_s = time.monotonic()
        fault()
        took_s = time.monotonic() - began_s
    counted = set(service.processes("Gateway")) == gateways  # else those that are gone have counted
    verdicts = load.verdicts
    return {
        "fault": name, "streams": load.ended, "right": verdicts["right"], "failed": verdicts["failed"],
        "wrong": load.ended - verdicts["right"] - verdicts["failed"],
        "continued": round(continuations(service) - before) if counted else "",
        "longest_pause_s": round(load.pause_s, 2), "took_s": round(took_s, 1), "errors": dict(load.errors),
    }  # fmt: skip


def continuations(service: Service) -> float:
    return service.samples("gateway").get("ranklet_continuations_total", 0.0)


def main() -> None:
    parser = report.parser(__doc__, "stream-faults-cpu")
    parser.add_argument("--streams", type=int, default=64, help="streams that are open at the same time")
    parser.add_argument(
        "--least", type=int, default=1000, help="faults are repeated until this many streams have ended"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens of the longest text")
    parser.add_argument("--faults", nargs="*", help="names of the faults; default: all")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        content = configuration(folder)
        models = [BASE, *sorted(path.name for path in (folder / "adapters").iterdir())[:3]]
        with serving(content, folder, LocalCluster(http_port=0, report=print)) as service:
            load = StreamLoad(service.url, stream_requests(models, 12, options.tokens))
            rows.append(measure(load, service, "none", lambda: time.sleep(_SETTLE_S), options.streams))
            faults = [each for each in Faults(service).all().items() if each[0] in (options.faults or [each[0]])]
            for turn in itertools.count():
                if turn >= len(faults) and sum(row["streams"] for row in rows) >= options.least:
                    break
                rows.append(measure(load, service, *faults[turn % len(faults)], options.streams))
                print(rows[-1])
    counts = ("streams", "right", "failed", "wrong", "continued")
    total = {name: sum(row[name] or 0 for row in rows) for name in counts}
    longest = {name: max(row[name] for row in rows) for name in ("longest_pause_s", "took_s")}
    rows.append({"fault": "all", **total, **longest, "errors": {}})
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
