"""A real cluster over HTTP: replicas on every GPU of this machine, many adapters, and how often each found its adapter.

usage: python -m tests.bench.cluster [--replicas 2] [--gateways 4] [--adapters 16] [--requests 4000] [--tokens 512]
"""

import argparse
import asyncio
import base64
import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np
import torch
import yaml

from ranklet.cluster.local import LocalCluster, State
from tests.assets.tokenizer import save_tokenizer
from tests.bench import report
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model


def configuration(folder: Path, replicas: int, gateways: int, slots: int) -> dict[str, Any]:
    """`serve deploy`'s configuration: one replica a GPU where there are GPUs, else on the CPU."""
    gpus = torch.cuda.device_count()
    engine: dict[str, Any] = {
        "slots": slots, "max_rank": 64, "max_batch_tokens": 30_720, "lora_modules": list(ATTENTION),
    }  # fmt: skip
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


@contextlib.contextmanager
def served(
    folder: Path, layers: int, adapters: int, *, replicas: int = 1, gateways: int, slots: int, backend: str = "auto"
) -> Iterator[tuple[State, list[str]]]:
    """A cluster of random weights at the real widths, and its adapters' names; stopped in the end."""
    write_model(folder / "model", layers=layers)
    save_tokenizer(folder / "model", vocab_size=1024, max_length=32_768)
    made = write_adapters(folder / "adapters", adapters, layers=layers)
    asked = configuration(folder, replicas, gateways, slots)
    asked["applications"][0]["args"]["engine"]["backend"] = backend
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(asked))
    cluster = LocalCluster(http_port=0, report=print)
    state = cluster.start(path, timeout_s=300)
    try:
        yield state, [one.name for one in made]
    finally:
        cluster.stop()


async def drive(url: str, adapters: list[str], requests: int, tokens: int, concurrency: int) -> list[dict[str, Any]]:
    """Send requests that name adapters uniformly at random; what each answer's headers and status said.

    The client is aiohttp's: httpx, though kinder to use, spends 10 ms a request on 64 connections.
    """
    rng = np.random.default_rng(0)
    names = rng.choice(adapters, requests)
    prompts = rng.integers(0, QWEN3_EMBEDDING_06B.vocab, (64, tokens)).tolist()
    limit = asyncio.Semaphore(concurrency)
    pool = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=pool, timeout=aiohttp.ClientTimeout(total=120)) as client:

        async def ask(i: int) -> dict[str, Any]:
            body = {"model": str(names[i]), "input": prompts[i % 64], "encoding_format": "base64"}
            async with limit:
                began = perf_counter()
                async with client.post(f"{url}/v1/embeddings", json=body) as answer:
                    said = await answer.json()
                seconds = perf_counter() - began
            vector = np.frombuffer(base64.b64decode(said["data"][0]["embedding"]), np.float32)
            return {
                "status": answer.status, "replica": answer.headers["x-ranklet-replica"], "adapter": str(names[i]),
                "tier": answer.headers["x-ranklet-tier"], "seconds": seconds, "prompt": i % 64, "vector": vector,
            }  # fmt: skip

        return list(await asyncio.gather(*(ask(i) for i in range(requests))))


def summary(answers: list[dict[str, Any]], seconds: float, tokens: int, label: str) -> dict[str, Any]:
    """One row of the result."""
    shares = Counter(answer["replica"] for answer in answers)
    tiers = Counter(answer["tier"] for answer in answers)
    latency = np.array([answer["seconds"] for answer in answers])
    return {
        "phase": label, "requests": len(answers), "ok": sum(answer["status"] == 200 for answer in answers),
        "per replica": "/".join(str(count) for count in sorted(shares.values())),
        "already held": f"{tiers['gpu'] / len(answers):.4f}", "tiers": dict(tiers),
        "least cosine of repeats": f"{_agreement(answers):.6f}",
        "tokens_per_s": round(len(answers) * tokens / seconds),
        "p50_ms": float(np.percentile(latency, 50) * 1e3), "p99_ms": float(np.percentile(latency, 99) * 1e3),
    }  # fmt: skip


def _agreement(answers: list[dict[str, Any]]) -> float:
    """The least cosine between two answers to the same prompt and adapter, whichever replicas gave them."""
    first: dict[tuple[str, int], np.ndarray] = {}
    return min(float(a["vector"] @ first.setdefault((a["adapter"], a["prompt"]), a["vector"])) for a in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--name", default="cluster-2xh200")
    options = parser.parse_args()
    shape = {"replicas": options.replicas, "gateways": options.gateways, "slots": options.slots}
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(Path(scratch), options.layers, options.adapters, **shape) as (state, names),
    ):
        rows = []
        for label in ("cold", "steady", "steady again"):
            began = perf_counter()
            drawn = drive(state.base_url, names, options.requests, options.tokens, options.concurrency)
            answers = asyncio.run(drawn)
            rows.append(summary(answers, perf_counter() - began, options.tokens, label))
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
