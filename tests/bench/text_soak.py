"""Run a saturated server for minutes with texts and embeddings, and compare texts with the same tokens computed alone.

Texts have random lengths and seeds, for more adapters than slots. Some clients leave in the middle of a text, some
adapters are replaced again and again, and the key-value cache is too small for all texts, so that some are preempted.
Of one text in some, the logprobs that came with its tokens are compared with those of the same tokens as a prompt, sent
alone at the end. Once a minute the memory of the GPU and of each kind of process is sampled.
"""

import argparse
import asyncio
import shutil
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
import torch

from ranklet.kernels.mixes import assign
from ranklet.replicas.cache.tensors import page_bytes
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench import report
from tests.bench.cluster import Served, configuration, growth, running, samples
from tests.bench.shapes import write_adapters
from tests.bench.soak import used
from tests.bench.texts import RANK, SHAPES, add_keep, make_text_model
from tests.bench.vocabulary import save_full_tokenizer

_REPLACED = 4  # adapters that are replaced again and again
_WEIGHTS = "adapter_model.safetensors"
_FAILED = (aiohttp.ClientError, TimeoutError)


class Sample(NamedTuple):
    """A text, to be compared with the same tokens computed alone.

    Attributes:
        fingerprint: revisions of the base model and of the adapter.
    """

    model: str
    fingerprint: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass
class SoakTexts:
    texts: int = 0
    tokens: int = 0
    left: int = 0  # texts whose client left
    embeddings: int = 0
    replaced: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)


class TextSoak:
    """Requests of one run.

    Args:
        adapters: folders of the served adapters.
        others: folders with other weights, one for each adapter that is replaced.
    """

    def __init__(self, cluster: Served, adapters: Path, others: Path, options: argparse.Namespace) -> None:
        self._url, self._pid = cluster.state.base_url, cluster.state.pid
        self._models = ["base", *cluster.adapters]
        self._adapters, self._others = adapters, sorted(others.iterdir())
        self._options = options
        self._vocab = SHAPES[options.shapes].vocab
        self._until_s = 0.0
        self.seen = SoakTexts()
        self.differences: list[float] = []

    async def run(self) -> Counter[str]:
        """Run for the given minutes. Returns what `compared` found."""
        self._until_s = time.monotonic() + self._options.minutes * 60
        self._turns = iter(assign("zipf:0.8", 1 << 20, len(self._models), seed=1))
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            texts = (self._texts(client, seed) for seed in range(self._options.texts))
            vectors = (self._embeddings(client, seed) for seed in range(self._options.embeddings))
            await asyncio.gather(self._watch(), self._replace(), *texts, *vectors)
            return await self._compared(client)

    @property
    def _lasts(self) -> bool:
        return bool(time.monotonic() < self._until_s)

    def _prompt(self, rng: np.random.Generator) -> list[int]:
        length = int(np.exp(rng.uniform(0, np.log(self._options.longest))))
        return [int(token) for token in rng.integers(0, self._vocab, max(length, 1))]

    async def _texts(self, client: aiohttp.ClientSession, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while self._lasts:
            body = {
                "model": self._models[next(self._turns)], "prompt": self._prompt(rng), "temperature": 1.0,
                "seed": int(rng.integers(1 << 30)), "max_tokens": int(rng.integers(1, self._options.longest + 1)),
                "ignore_eos": True,
            }  # fmt: skip
            try:
                if rng.random() < self._options.sampled:
                    await self._sampled(client, body)
                else:
                    await self._streamed(client, body, leaves=rng.random() < self._options.leaving)
            except _FAILED as error:
                self.seen.failures[type(error).__name__] += 1

    async def _sampled(self, client: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        asked = body | {"logprobs": 0, "return_token_ids": True}
        async with client.post(f"{self._url}/v1/completions", json=asked) as answer:
            content = orjson.loads(await answer.read())
        if answer.status != 200:
            self.seen.failures[content["error"]["code"]] += 1
            return
        (choice,) = content["choices"]
        self._count(len(choice["token_ids"]), body)
        logprobs = choice["logprobs"]["token_logprobs"]
        self.seen.samples.append(
            Sample(body["model"], content["system_fingerprint"], body["prompt"], choice["token_ids"], logprobs)
        )

    async def _streamed(self, client: aiohttp.ClientSession, body: dict[str, Any], *, leaves: bool) -> None:
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with client.post(f"{self._url}/v1/completions", json=asked) as answer:
            if answer.status != 200:
                self.seen.failures[orjson.loads(await answer.read())["error"]["code"]] += 1
                return
            lines = [line async for line in _data(answer)] if not leaves else [await anext(_data(answer))]
        if leaves:
            self.seen.left += 1
            return
        frames = [orjson.loads(line) for line in lines[:-1]]
        errors = [frame["error"]["code"] for frame in frames if "error" in frame]
        if errors or lines[-1] != b"[DONE]":
            self.seen.failures[errors[0] if errors else "no end"] += 1
            return
        self._count(frames[-1]["usage"]["completion_tokens"], body)

    def _count(self, tokens: int, body: dict[str, Any]) -> None:
        if tokens != body["max_tokens"]:
            self.seen.failures["another length"] += 1
        self.seen.texts += 1
        self.seen.tokens += tokens

    async def _embeddings(self, client: aiohttp.ClientSession, seed: int) -> None:
        rng = np.random.default_rng(1_000_000 + seed)
        while self._lasts:
            body = {"model": self._models[next(self._turns)], "input": [self._prompt(rng) for _ in range(8)]}
            try:
                async with client.post(f"{self._url}/v1/embeddings", json=body) as answer:
                    content = orjson.loads(await answer.read())
            except _FAILED as error:
                self.seen.failures[type(error).__name__] += 1
                continue
            if answer.status != 200:
                self.seen.failures[content["error"]["code"]] += 1
            else:
                self.seen.embeddings += len(content["data"])

    async def _replace(self) -> None:
        """Give some adapters other weights, and then their own again."""
        folders = [self._adapters / name for name in self._models[-_REPLACED:]]
        weights = [[(folder / _WEIGHTS).read_bytes(), (other / _WEIGHTS).read_bytes()]
                   for folder, other in zip(folders, self._others, strict=True)]  # fmt: skip
        for turn in range(1, 1 << 30):
            await asyncio.sleep(self._options.replace_s)
            if not self._lasts:
                return
            for folder, contents in zip(folders, weights, strict=True):
                new = folder / "new"
                new.write_bytes(contents[turn % 2])
                new.replace(folder / _WEIGHTS)
                self.seen.replaced += 1

    async def _watch(self) -> None:
        while self._lasts:
            await asyncio.sleep(min(60.0, max(0.1, self._until_s - time.monotonic())))
            self.seen.memory.append(await asyncio.to_thread(used, self._pid))

    async def _compared(self, client: aiohttp.ClientSession) -> Counter[str]:
        """Compute the sampled texts alone, as prompts, and note the differences of logprobs in the samples' order."""
        found: Counter[str] = Counter()
        for sample in self.seen.samples[-self._options.compared :]:
            body = {
                "model": sample.model, "prompt": sample.prompt + sample.tokens, "max_tokens": 1, "prompt_logprobs": 0,
                "temperature": 0,
            }  # fmt: skip
            async with client.post(f"{self._url}/v1/completions", json=body) as answer:
                content = orjson.loads(await answer.read())
            if answer.status != 200:
                found[content["error"]["code"]] += 1
            elif content["system_fingerprint"] != sample.fingerprint:
                found["replaced since then"] += 1
            else:
                found["compared"] += 1
                places = content["choices"][0]["prompt_logprobs"][len(sample.prompt) :]
                alone = [place[str(token)]["logprob"] for place, token in zip(places, sample.tokens, strict=True)]
                self.differences += np.abs(np.subtract(alone, sample.logprobs)).tolist()
        return found


async def _data(answer: aiohttp.ClientResponse) -> Any:
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield line[6:].strip()


def pages(url: str) -> Iterator[dict[str, int]]:
    """Yield each replica's pages by state."""
    for found in samples(url, "replica").values():
        yield {state: int(found[f'ranklet_kv_pages{{state="{state}"}}']) for state in ("used", "cached", "free")}


def main() -> None:
    parser = report.parser(__doc__, "text-soak-h200")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="0.6B", help="model")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the run")
    parser.add_argument("--adapters", type=int, default=80, help="number of adapters")
    parser.add_argument("--slots", type=int, default=64, help="adapter slots of the replica")
    parser.add_argument("--pages", type=int, default=1000, help="pages of the key-value cache, of 64 tokens")
    parser.add_argument(
        "--longest", type=int, default=768, help="tokens of the longest prompt, and of the longest text"
    )
    parser.add_argument("--texts", type=int, default=320, help="texts in flight")
    parser.add_argument("--embeddings", type=int, default=8, help="requests with eight prompts in flight")
    parser.add_argument("--gateways", type=int, default=4, help="number of gateways")
    parser.add_argument("--leaving", type=float, default=0.05, help="part of the streams whose client leaves")
    parser.add_argument("--sampled", type=float, default=0.05, help="part of the texts that may be compared")
    parser.add_argument("--compared", type=int, default=300, help="texts that are compared")
    parser.add_argument("--replace-s", type=float, default=10.0, help="seconds between replacements of adapters")
    add_keep(parser)
    options = parser.parse_args()
    shape = SHAPES[options.shapes]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_text_model(options.keep or scratch, options.shapes, options.adapters)
        save_full_tokenizer(model.folder, shape.vocab)
        adapters = scratch / "own" / "adapters"  # some of these are replaced
        shutil.copytree(model.folder.parent / "adapters", adapters, copy_function=shutil.copyfile)
        (adapters.parent / "model").symlink_to(model.folder)
        others = scratch / "others"
        write_adapters(others, _REPLACED, shape=shape, rank=RANK, modules=LINEAR_MODULES)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        engine = {
            "slots": options.slots, "max_rank": RANK, "max_batch_requests": 256, "max_model_len": 8192,
            "kv_cache_bytes": options.pages * page_bytes(shape, dtype),
        }  # fmt: skip
        content = configuration(adapters.parent, 1, options.gateways, engine)
        cluster = stack.enter_context(running(adapters.parent, content))
        url = cluster.state.base_url
        before = samples(url, "replica")
        soak = TextSoak(cluster, adapters, others, options)
        compared = asyncio.run(soak.run())
        (grown,) = growth(before, samples(url, "replica")).values()
        (held,) = pages(url)
        urllib.request.urlopen(f"{url}/ready", timeout=60).close()  # the engine checks its pages for this
    seen, differences = soak.seen, np.array(soak.differences)
    rows: list[dict[str, Any]] = [{
        "minute": "all", "texts": seen.texts, "tokens_per_s": round(seen.tokens / (options.minutes * 60)),
        "embeddings": seen.embeddings, "left": seen.left, "replaced": seen.replaced, "failed": dict(seen.failures),
        "preempted": int(grown["ranklet_preemptions_total"]), "compared": dict(compared),
        "tokens compared": len(differences), "largest difference": float(differences.max()),
        "p99 difference": float(np.percentile(differences, 99)), "mean difference": float(differences.mean()),
        "pages": held, "MB": "",
    }]  # fmt: skip
    rows += [dict.fromkeys(rows[0], "") | {"minute": i + 1, "MB": found} for i, found in enumerate(seen.memory)]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
