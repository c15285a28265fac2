"""Throughput of several GPUs of one machine behind one app, measured with `ranklet bench`.

Covers scaling against one replica, more adapters than slots, and one adapter that gets most of the traffic.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.run import run_bench
from ranklet.cluster.command.cluster_state import ClusterState
from ranklet.cluster.command.local_cluster import LocalCluster
from tests.assets.tokenizer import save_tokenizer
from tests.bench import report
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model

_MOST_SETTLING = 6  # runs
_STILL = 0.01  # change of the hit rate
Samples = dict[str, dict[str, float]]  # metric values by replica or gateway id, then by name with labels


def configuration(folder: Path, replicas: int, gateways: int, engine: dict[str, Any]) -> dict[str, Any]:
    """Return a Serve configuration with one GPU for each replica, or with CPU replicas where there is no GPU.

    Args:
        engine: settings of the engines.
    """
    gpus = torch.cuda.device_count()
    actor = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": 0.5}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 0},
        "applications": [{
            "name": "ranklet", "route_prefix": "/", "import_path": "ranklet.cluster.app:build",
            "args": {
                "base": {"model_dir": str(folder / "model"), "name": "base"},
                "adapters_dir": str(folder / "adapters"), "engine": engine,
            },
            "deployments": [
                {"name": "Gateway", "num_replicas": gateways, "ray_actor_options": {"num_cpus": 0.5}},
                {"name": "Replica", "num_replicas": replicas, "ray_actor_options": actor},
            ],
        }],
    }  # fmt: skip


class Served(NamedTuple):
    """A running cluster, the names of its adapters, and its Serve configuration."""

    state: ClusterState
    adapters: list[str]
    cluster: LocalCluster
    content: dict[str, Any]


@contextlib.contextmanager
def served(
    folder: Path, layers: int, adapters: int, *, replicas: int = 1, gateways: int, slots: int, backend: str = "auto"
) -> Iterator[Served]:
    """Run a cluster with random weights at the model's real widths."""
    write_model(folder / "model", layers=layers)
    save_tokenizer(folder / "model", vocab_size=1024, max_length=32_768)
    write_adapters(folder / "adapters", adapters, layers=layers)
    engine = {
        "slots": slots, "max_rank": 64, "max_batch_tokens": 30_720, "lora_modules": list(ATTENTION), "backend": backend,
    }  # fmt: skip
    with running(folder, configuration(folder, replicas, gateways, engine)) as cluster:
        yield cluster


@contextlib.contextmanager
def running(folder: Path, content: dict[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Run a cluster that serves the model and the adapters of `folder`.

    Args:
        environment: additional variables for Ray's processes.
    """
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    cluster = LocalCluster(http_port=0, report=print, environment=environment)
    state = cluster.start(path, timeout_s=300)
    content["http_options"]["port"] = int(state.base_url.rpartition(":")[2])
    try:
        yield Served(state, sorted(one.name for one in (folder / "adapters").iterdir()), cluster, content)
    finally:
        cluster.stop()


def samples(url: str, role: str) -> Samples:
    """Fetch the metrics of every replica or every gateway."""
    with urllib.request.urlopen(f"{url}/metrics/targets", timeout=30) as answer:
        targets = [group for group in json.load(answer) if group["labels"]["role"] == role]
    found = {}
    for group in targets:
        with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=30) as answer:
            lines = re.findall(r"^(\w+(?:{[^}]*})?) (\S+)$", answer.read().decode(), re.MULTILINE)
        found[group["labels"]["replica"]] = {name: float(value) for name, value in lines}
    return found


def plans(
    url: str, adapters: list[str], processes: int, replicas: int, requests: int
) -> dict[str, tuple[BenchPlan, str]]:
    """Return the plan of each row and the name of the row it is compared with, or "" if there is none."""
    long = BenchPlan(
        base_url=url, vocab=QWEN3_EMBEDDING_06B.vocab, processes=processes, num_prompts=requests * replicas,
        input_len=6144, adapter_distribution="distinct", warmup=0, max_concurrency=120 * replicas,
    )  # fmt: skip
    short = dataclasses.replace(
        long, num_prompts=36 * requests * replicas, input_len=512, max_concurrency=800 * replicas
    )
    few, many, every = tuple(adapters[:4]), tuple(adapters[:64]), tuple(adapters)
    rows = {
        "6144 tokens, 4 adapters": (dataclasses.replace(long, adapters=few), ""),
        "6144 tokens, 64 adapters": (dataclasses.replace(long, adapters=many), ""),
        "512 tokens, 4 adapters": (dataclasses.replace(short, adapters=few), ""),
        "512 tokens, 64 adapters": (dataclasses.replace(short, adapters=many), ""),
    }
    if replicas == 1:
        return rows
    hot = dataclasses.replace(long, adapters=many, adapter_distribution="zipf:2")
    return {
        **rows,
        "6144 tokens, one adapter of 64 takes 61 %": (hot, "6144 tokens, 64 adapters"),
        "6144 tokens, all adapters": (dataclasses.replace(long, adapters=every), "6144 tokens, 64 adapters"),
        "512 tokens, all adapters": (dataclasses.replace(short, adapters=every), "512 tokens, 64 adapters"),
    }


def measured(url: str, name: str, plan: BenchPlan, replicas: int, repeats: int) -> dict[str, Any]:
    """Return one row: the median rate, and over all runs the devices' busy shares and the slot hit rate."""
    settled_s = settled(url, plan, repeats)
    rates, p99_ms, failed, seconds = [], [], 0, 0.0
    before = samples(url, "replica")
    for seed in range(repeats):
        found = run_bench(dataclasses.replace(plan, seed=seed))
        rates.append(round(found.overall.tokens_per_s))
        p99_ms.append(found.overall.p99_ms)
        failed += found.overall.requests - found.overall.answered
        seconds += found.seconds
    after = samples(url, "replica")
    grown = growth(before, after)
    busy = [found["ranklet_device_busy_seconds_total"] / seconds for found in grown.values()]
    return {
        "replicas": replicas, "work": name, "tokens_per_s": median(rates), "runs": "/".join(map(str, sorted(rates))),
        "p99_ms": median(p99_ms), "failed": failed, "least busy": min(busy), "busiest": max(busy),
        "found on the device": slot_hit_rate(grown), "settled in s": settled_s,
    }  # fmt: skip


def settled(url: str, plan: BenchPlan, seed: int) -> float:
    """Run without counting until the slot hit rate stops rising. Returns the seconds it took."""
    seconds, hits = 0.0, 0.0
    for number in range(_MOST_SETTLING):
        before = samples(url, "replica")
        seconds += run_bench(dataclasses.replace(plan, seed=seed + number)).seconds
        hits, hits_before = slot_hit_rate(growth(before, samples(url, "replica"))), hits
        if hits - hits_before < _STILL or hits > 1 - _STILL:
            break
    return seconds


def growth(before: Samples, after: Samples) -> Samples:
    return {id: {name: value - before[id].get(name, 0.0) for name, value in now.items()} for id, now in after.items()}


def slot_hit_rate(grown: Samples) -> float:
    tiers = {
        tier: sum(found.get(f'ranklet_tier_hits_total{{tier="{tier}"}}', 0.0) for found in grown.values())
        for tier in ("gpu", "host", "disk")
    }
    return tiers["gpu"] / max(sum(tiers.values()), 1)


def scaled(served: Served, deployment: str, count: int) -> None:
    """Deploy the app with another number of gateways or replicas and wait until they run.

    Args:
        deployment: Gateway or Replica.
    """
    for each in served.content["applications"][0]["deployments"]:
        if each["name"] == deployment:
            each["num_replicas"] = count
    served.cluster.deploy(served.content)
    while len(samples(served.state.base_url, deployment.lower())) != count:
        time.sleep(0.5)


def main() -> None:
    parser = report.parser(__doc__, "cluster-4xh200")
    parser.add_argument("--replicas", type=int, default=max(torch.cuda.device_count(), 2), help="number of replicas")
    parser.add_argument("--gateways", type=int, default=32, help="number of gateways")
    parser.add_argument("--processes", type=int, default=12, help="processes of the load client")
    parser.add_argument("--adapters", type=int, default=256, help="number of adapters")
    parser.add_argument("--slots", type=int, default=64, help="adapter slots of each replica")
    parser.add_argument("--requests", type=int, default=240, help="requests of 6144 tokens for each replica")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; the median counts")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    options = parser.parse_args()
    shape = {"replicas": options.replicas, "gateways": options.gateways, "slots": options.slots}
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(Path(scratch), options.layers, options.adapters, **shape) as cluster,
    ):
        url = cluster.state.base_url
        for replicas in (options.replicas, 1):
            if replicas == 1:
                scaled(cluster, "Replica", 1)
            work = plans(url, cluster.adapters, options.processes, replicas, options.requests)
            for name, (plan, against) in work.items():
                row = measured(url, name, plan, replicas, options.repeats)
                same = {found["work"]: found["tokens_per_s"] for found in rows if found["replicas"] != replicas}
                other = {found["work"]: found["tokens_per_s"] for found in rows if found["replicas"] == replicas}
                row["of one replica"] = same[name] / row["tokens_per_s"] if replicas == 1 else ""
                row["of 64 adapters"] = row["tokens_per_s"] / other[against] if against else ""
                rows.append(row)
                console.print(f"{replicas} replicas, {name}: {row['tokens_per_s']:,.0f} tokens/s")
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
