"""A real Prometheus on a free port that scrapes a running service with deploy/prometheus.yml."""

import contextlib
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from ranklet.cluster.command.ports import free_ports
from tests.cluster.service import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPE_S = 2  # also the time that a scrape may take


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API of a Prometheus."""

    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query. Fails if the query is malformed."""
        return list(self._get("query", {"query": expr})["result"])

    def panel_data(self, expr: str) -> list[dict[str, Any]]:
        """Return the samples of a board's or rule's query once one of them is finite. Fails if none ever is."""
        query = expr.replace("$__rate_interval", "10s")
        samples: list[dict[str, Any]] = []

        def has_data() -> bool:
            samples[:] = self.query(query)  # a later query may find none: a scrape fails on a busy machine
            return bool(finite(samples))

        eventually(f"{query}: finite data", has_data)
        return samples

    def query_range(self, expr: str, seconds: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Return the series of the last `seconds`."""
        now_s = time.time()
        parameters = {"query": expr, "start": now_s - seconds, "end": now_s, "step": step_s}
        return list(self._get("query_range", parameters)["result"])

    def targets(self) -> list[dict[str, Any]]:
        return list(self._get("targets", {})["activeTargets"])

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules, each with the name of its group."""
        groups = self._get("rules", {})["groups"]
        return [{**rule, "group": group["name"]} for group in groups for rule in group["rules"]]

    def _get(self, call: str, parameters: dict[str, Any]) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{call}", params=parameters, timeout=30, trust_env=False)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]


def finite(samples: list[dict[str, Any]]) -> list[float]:
    values = [float(sample["value"][1]) for sample in samples]
    return [value for value in values if math.isfinite(value)]


@contextlib.contextmanager
def scraping(service_url: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with deploy/prometheus.yml, but with the service's address and short intervals."""
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    content["rule_files"] = [str(DEPLOY / name) for name in content["rule_files"]]
    (discovery,) = content["scrape_configs"][0]["http_sd_configs"]
    discovery.update(url=f"{service_url}/metrics/targets", refresh_interval="1s")
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(content))
    (port,) = free_ports(1)
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{found.url}/-/ready", trust_env=False).status_code == 200
            return False

        eventually("Prometheus is ready", is_ready)
        yield found
    finally:
        process.terminate()
        process.wait()
