"""Run a saturated server for minutes and compare every answer with that of the same prompt sent alone.

Requests have one to four prompts of 1 to 8192 tokens, for more adapters than slots. Once a minute the memory of the GPU
and of each kind of process is sampled.
"""

import asyncio
import base64
import contextlib
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from ranklet.kernels.mixes import assign
from tests.bench import report
from tests.bench.cluster import served
from tests.bench.shapes import QWEN3_EMBEDDING_06B
from tests.cluster.nodes import command_line, process_tree

_PROMPTS_EACH = 6
_KINDS = {
    ":Replica": "replica actor", ":Gateway": "gateways", "ray::": "ray's actors",
    "ranklet.replicas.process.worker": "engine",
    "haproxy": "haproxy",
}  # fmt: skip


@dataclass
class SoakAnswers:
    cosines: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Prompts:
    """Prompts of each adapter, and the vectors they got when sent alone."""

    def __init__(self, adapters: list[str], longest: int, vocab: int) -> None:
        rng = np.random.default_rng(0)
        self.names = ["base", *adapters]
        lengths = np.exp(rng.uniform(0, np.log(longest), len(self.names) * _PROMPTS_EACH)).astype(int).clip(1, longest)
        self.tokens = [rng.integers(0, vocab, length).tolist() for length in lengths.tolist()]
        self.alone: list[NDArray[np.float32]] = []

    def body(self, name: int, chosen: list[int]) -> bytes:
        given = [self.tokens[name * _PROMPTS_EACH + i] for i in chosen]
        return orjson.dumps({"model": self.names[name], "input": given, "encoding_format": "base64"})


async def send(client: aiohttp.ClientSession, url: str, body: bytes) -> tuple[str, list[NDArray[np.float32]]]:
    """Send a request. Returns the error code, "" on success, and the vectors."""
    try:
        async with client.post(f"{url}/v1/embeddings", data=body) as answer:
            content = orjson.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__, []
    if answer.status != 200:
        return str(content["error"]["code"]), []
    return "", [np.frombuffer(base64.b64decode(entry["embedding"]), np.float32) for entry in content["data"]]


async def soak(
    url: str, prompts: Prompts, minutes: float, concurrency: int, pid: int
) -> tuple[SoakAnswers, list[dict[str, Any]]]:
    """Send each prompt alone, then keep `concurrency` requests in flight for `minutes`. Returns answers and memory."""
    seen, memory = SoakAnswers(), []
    headers = {"content-type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout
    ) as client:
        for name in range(len(prompts.names)):
            for i in range(_PROMPTS_EACH):
                failed, vectors = await send(client, url, prompts.body(name, [i]))
                assert not failed, failed
                prompts.alone.append(vectors[0])
        names = assign("zipf:0.8", 1 << 20, len(prompts.names), seed=1)
        turns = iter(range(1 << 30))
        until_s = time.monotonic() + minutes * 60

        async def worker(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while time.monotonic() < until_s:
                name = names[next(turns) % len(names)]
                chosen = rng.choice(_PROMPTS_EACH, rng.integers(1, 5), replace=False).tolist()
                failed, vectors = await send(client, url, prompts.body(name, chosen))
                if failed:
                    seen.failures[failed] += 1
                for i, vector in zip(chosen, vectors, strict=False):
                    at = name * _PROMPTS_EACH + i
                    seen.cosines.append(float(vector @ prompts.alone[at]))
                    seen.tokens += len(prompts.tokens[at])

        async def watch() -> None:
            while time.monotonic() < until_s:
                await asyncio.sleep(min(60.0, max(0.1, until_s - time.monotonic())))
                memory.append(await asyncio.to_thread(used, pid))

        await asyncio.gather(watch(), *(worker(seed) for seed in range(concurrency)))
    return seen, memory


def used(pid: int) -> dict[str, Any]:
    """Return megabytes used on the GPU, and megabytes resident by kind of process, of `pid` and its descendants."""
    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        found["gpu"] = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    for each in process_tree(pid):
        command = command_line(each)
        with contextlib.suppress(OSError):  # the process has ended
            pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
            kind = next((kind for mark, kind in _KINDS.items() if mark in command), "ray's own")
            found[kind] = found.get(kind, 0) + pages * 4096 // 1_000_000
    return found


def main() -> None:
    parser = report.parser(__doc__, "soak-h200")
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the run")
    parser.add_argument("--adapters", type=int, default=80, help="number of adapters")
    parser.add_argument("--slots", type=int, default=64, help="adapter slots of each replica")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of the longest prompt")
    parser.add_argument("--gateways", type=int, default=4, help="number of gateways")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    options = parser.parse_args()
    shape = {"gateways": options.gateways, "slots": options.slots}
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(Path(scratch), options.layers, options.adapters, **shape) as running,
    ):
        prompts = Prompts(running.adapters, options.longest, QWEN3_EMBEDDING_06B.vocab)
        run = soak(running.state.base_url, prompts, options.minutes, options.concurrency, running.state.pid)
        seen, memory = asyncio.run(run)
    cosines = np.array(seen.cosines)
    rows: list[dict[str, Any]] = [{
        "minute": "all", "answers": len(cosines), "failed": dict(seen.failures),
        "least cosine": f"{cosines.min():.6f}", "below 0.9999": int((cosines < 0.9999).sum()),
        "median cosine": f"{np.median(cosines):.7f}", "tokens_per_s": round(seen.tokens / (options.minutes * 60)),
        "MB": "",
    }]  # fmt: skip
    rows += [dict.fromkeys(rows[0], "") | {"minute": i + 1, "MB": found} for i, found in enumerate(memory)]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
