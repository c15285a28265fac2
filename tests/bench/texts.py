"""Engines that generate text with the shapes of real models, and requests whose tokens are timed as they arrive."""

import argparse
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.errors import RankletError
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench.engine import refs
from tests.bench.own_engine import own_engine
from tests.bench.shapes import LLAMA_31_8B, QWEN3_06B, decoder, write_adapters, write_model

RANK = 16
SHAPES = {
    "0.6B": QWEN3_06B,
    "8B": LLAMA_31_8B,
    "tiny": decoder(
        "Qwen3ForCausalLM", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=500
    ),
}


@dataclass(frozen=True)
class TextModel:
    """A model folder and adapters of rank 16 on all seven projections."""

    shape: Architecture
    folder: Path
    adapters: list[AdapterRef]


def make_text_model(folder: Path, name: str, adapters: int) -> TextModel:
    """Write the model and its adapters below `folder`, unless an earlier run wrote them there."""
    shape, where = SHAPES[name], folder / name
    if not (where / "written").exists():
        write_model(where / "model", shape)
        write_adapters(where / "adapters", adapters, shape=shape, rank=RANK, modules=LINEAR_MODULES)
        (where / "written").write_text(str(adapters))
    elif int((where / "written").read_text()) < adapters:
        raise ValueError(f"{where}: expected at least {adapters} adapters; remove the folder")
    return TextModel(shape, where / "model", refs(sorted((where / "adapters").iterdir())[:adapters]))


def add_keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models here, for further runs")


@contextmanager
def model_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Return the folder of `--keep`, or one that is removed at the end."""
    if options.keep is not None:
        yield options.keep
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


@contextmanager
def text_engine(model: TextModel, **fields: Any) -> Iterator[Engine]:
    """Start an engine that has a slot for each adapter, and load them."""
    defaults = {"slots": max(1, len(model.adapters)), "max_rank": RANK, "host_cache_bytes": 16 << 30}
    with own_engine(EngineConfig(model.folder, **{**defaults, **fields})) as engine:
        for ref in model.adapters:
            engine.load(ref)
        yield engine


@dataclass
class TokenTimes:
    """A sink that notes when each token arrives."""

    finished: threading.Semaphore
    times_s: list[float] = field(default_factory=list)
    result: Answer | RankletError | None = None

    def begun(self, index: int, cached_tokens: int) -> None:
        pass

    def delta(self, index: int, piece: Any) -> None:
        self.times_s.append(perf_counter())

    def done(self, result: Answer | RankletError) -> None:
        self.result = result
        self.finished.release()

    def answer(self) -> Answer:
        if isinstance(self.result, RankletError):
            raise self.result
        assert self.result is not None
        return self.result


@dataclass(frozen=True)
class TextRun:
    """Requests that were submitted at once and have finished."""

    texts: list[TokenTimes]
    began_s: float
    took_s: float

    @property
    def tokens(self) -> int:
        return sum(len(choice.tokens) for text in self.texts for choice in text.answer().result.choices)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.took_s

    def gaps_ms(self) -> NDArray[np.float64]:
        """Return the times between the tokens of each text, the first token left out."""
        return np.concatenate([np.diff(text.times_s) for text in self.texts]) * 1e3

    def first_ms(self) -> NDArray[np.float64]:
        """Return the time to each text's first token."""
        return np.array([text.times_s[0] - self.began_s for text in self.texts]) * 1e3


def greedy(max_tokens: int) -> GenerateParams:
    return GenerateParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def submit_texts(
    engine: Engine, prompts: Sequence[NDArray[np.int32]], adapters: Sequence[AdapterRef | None], max_tokens: int
) -> list[TokenTimes]:
    """Submit each prompt as its own greedy request, with the adapters in turn."""
    finished = threading.Semaphore(0)
    texts = [TokenTimes(finished) for _ in prompts]
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        engine.submit([prompt], adapters[i % len(adapters)], greedy(max_tokens), text)
    return texts


def run_texts(
    engine: Engine, prompts: Sequence[NDArray[np.int32]], adapters: Sequence[AdapterRef | None], max_tokens: int
) -> TextRun:
    """Submit greedy requests at once and wait for all of them."""
    began_s = perf_counter()
    texts = submit_texts(engine, prompts, adapters, max_tokens)
    for text in texts:
        text.finished.acquire()
    return TextRun(texts, began_s, perf_counter() - began_s)


def wait_for(
    engine: Engine, asked: Sequence[tuple[AdapterRef | None, NDArray[np.int32]]], params: GenerateParams
) -> list[Any]:
    """Submit each prompt as its own request and return the content of every answer."""
    finished = threading.Semaphore(0)
    texts = [TokenTimes(finished) for _ in asked]
    for (adapter, prompt), text in zip(asked, texts, strict=True):
        engine.submit([prompt], adapter, params, text)
    for text in texts:
        text.finished.acquire()
    return [text.answer().result for text in texts]


def random_prompts(engine: Engine, count: int, length: int, seed: int = 0) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng((length, seed))
    return [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for _ in range(count)]
