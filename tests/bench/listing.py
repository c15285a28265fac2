"""Time to find a thousand adapter folders, and latency of `GET /v1/models` with them.

The folders hold hard links to the files of a few real adapters. No request uses them, so no weights are read. `/health`
shows how much of the latency comes from HTTP and the machine.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track

from ranklet.cluster.catalog.registry import Registry
from tests.assets.cache import make_once
from tests.bench import report
from tests.cluster.service import Service, local_configuration, serving


def fill(folder: Path, made: Path, adapters: int) -> None:
    sources = [path for path in made.iterdir() if not path.name.startswith(".")]
    for number in range(adapters):
        target = folder / f"adapter-{number:05d}"
        target.mkdir(parents=True)
        for file in sources[number % len(sources)].iterdir():
            if file.is_file():
                os.link(file, target / file.name)


def scan_s(folder: Path) -> float:
    began_s = time.perf_counter()
    Registry(folder, {}).scan()
    return time.perf_counter() - began_s


def timed(service: Service, path: str, calls: int) -> tuple[list[float], httpx.Response]:
    """Return the milliseconds of consecutive calls on one connection, and the last answer."""
    took: list[float] = []
    with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as http:
        for _ in track(range(calls + 1), f"GET {path}", console=Console(stderr=True)):
            began_s = time.perf_counter()
            answer = http.get(path).raise_for_status()
            took.append((time.perf_counter() - began_s) * 1e3)
            time.sleep(0.02)
    return took, answer


def row(service: Service, path: str, calls: int) -> dict[str, Any]:
    took, answer = timed(service, path, calls)
    rest = np.array(took[1:])
    return {
        "path": path, "bytes": len(answer.content), "first_ms": took[0], "p50_ms": float(np.median(rest)),
        "p99_ms": float(np.percentile(rest, 99)), "max_ms": float(rest.max()),
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--adapters", type=int, default=1000, help="number of adapters")
    parser.add_argument("--calls", type=int, default=500, help="calls of each path")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = make_once(folder / "made")
        fill(folder / "adapters", made / "adapters", options.adapters)
        found = {"adapters": options.adapters, "registered_s": scan_s(folder / "adapters")}
        with serving(local_configuration(made / "model", folder / "adapters"), folder) as service:
            listed = len(httpx.get(f"{service.url}/v1/models", trust_env=False, timeout=60).json()["data"])
            if listed != options.adapters + 1:
                raise RuntimeError(f"expected {options.adapters} adapters and the base, got {listed}")
            rows = [found | row(service, path, options.calls) for path in ("/v1/models", "/health")]
    report.save("listing-cpu", rows, options.out)


if __name__ == "__main__":
    main()
