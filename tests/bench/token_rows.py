"""Slot memory and load time of adapters with 100 rows of tokens each, or with tokenizer files, relative to plain ones.

The kinds are plain adapters, adapters with trained tokens, with a copy of the base model's tokenizer files, and with
added tokens: these have tokenizer files that differ from adapter to adapter.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.model.modules import LINEAR_MODULES
from ranklet.replicas.model.tokenizer_files import TOKENIZER_FILES
from tests.assets.tokenizer import save_with_added
from tests.bench import report
from tests.bench.own_engine import own_engine
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model
from tests.bench.vocabulary import save_full_tokenizer

Change = Callable[[Path], None]  # of an adapter's folder


def add_rows(folder: Path, ids: list[int]) -> None:
    """Give an adapter rows of its own for these tokens."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": ids}))
    tensors = load_file(weights)
    prefix, _, _ = next(iter(tensors)).partition("layers.")
    dtype = next(iter(tensors.values())).dtype
    rows = (0.02 * torch.randn(len(ids), QWEN3_EMBEDDING_06B.hidden)).to(dtype)
    save_file({**tensors, f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta": rows}, weights)


def save_tokenizer_of_library(folder: Path, vocab: int) -> None:
    """Save a tokenizer as transformers writes it, with files as large as those of a real model."""
    from transformers import AutoTokenizer

    save_full_tokenizer(folder, vocab, merges=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def changes(model: Path, tokens: int) -> dict[str, Change]:
    """Return what each kind of adapters has besides LoRA."""
    vocab = QWEN3_EMBEDDING_06B.vocab

    def add_tokens(folder: Path) -> None:
        save_with_added(model, folder, *(f"<{folder.name}-{number}>" for number in range(tokens)))
        add_rows(folder, list(range(vocab, vocab + tokens)))

    def copy_tokenizer(folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (model / name).exists():
                shutil.copy(model / name, folder)

    return {
        "plain": lambda folder: None,
        "with trained tokens": lambda folder: add_rows(folder, list(range(tokens))),
        "with copied tokenizer files": copy_tokenizer,
        "with added tokens": add_tokens,
    }


def write_kinds(folder: Path, model: Path, count: int, tokens: int, **shape: Any) -> dict[str, list[AdapterRef]]:
    kinds = {}
    for name, change in changes(model, tokens).items():
        paths = write_adapters(folder / name.replace(" ", "-"), count, **shape)
        for path in track(paths, description=f"writing adapters {name}"):
            change(path)
        kinds[name] = [Revisions().reference(f"{path.parent.name}-{path.name}", str(path)) for path in paths]
    return kinds


def measure(
    config: EngineConfig, kinds: dict[str, list[AdapterRef]], rounds: int, engines: int
) -> list[dict[str, Any]]:
    """Load adapters into engines with a slot for each adapter of a kind, one of each kind in turn.

    In the first round of an engine adapters come from disk, later from host memory, since others took their slots. Each
    turn begins with another kind, the first with a plain adapter: memory for rows is taken once an adapter needs it. A
    share is the median of the ratios to the plain adapter of the same turn.
    """
    seconds = {name: {"disk": list[float](), "host": list[float]()} for name in kinds}
    memory: dict[str, float] = {}
    first_s: dict[str, float] = {}
    for number in range(engines):
        order = list(kinds)
        with own_engine(config) as engine:
            for turn in range(rounds):
                for i in track(range(config.slots), description=f"engine {number + 1}, round {turn + 1}"):
                    for name in order:
                        began_s = perf_counter()
                        engine.load(kinds[name][i])
                        took_s = perf_counter() - began_s
                        seconds[name]["host" if turn else "disk"].append(took_s)
                        first_s.setdefault(name, took_s)
                        memory.setdefault(name, engine.runner.pool.nbytes / config.slots)
                    order = order[1:] + order[:1]
    plain = seconds[next(iter(kinds))]
    base_memory = next(iter(memory.values()))
    return [
        {
            "adapters": f"{len(adapters)} {name}", "slot_mb": round(memory[name] / 1e6, 2),
            "slot_share": round(memory[name] / base_memory, 3), "first_ms": round(1e3 * first_s[name], 1),
            **{
                column: value
                for tier, found in seconds[name].items()
                for column, value in (
                    (f"{tier}_ms", round(1e3 * median(found), 3)),
                    (f"{tier}_share", round(median(map(truediv, found, plain[tier])), 3)),
                )
            },
        }
        for name, adapters in kinds.items()
    ]  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "token-rows-h200" if torch.cuda.is_available() else "token-rows-cpu")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--adapters", type=int, default=20, help="number of adapters of each kind")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--tokens", type=int, default=100, help="trained or added tokens of an adapter")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each adapter, the first one from disk")
    parser.add_argument("--engines", type=int, default=3, help="engines that load them, one after the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        save_tokenizer_of_library(model, QWEN3_EMBEDDING_06B.vocab)
        kinds = write_kinds(
            folder, model, options.adapters, options.tokens, layers=options.layers, rank=options.rank,
            modules=LINEAR_MODULES,
        )  # fmt: skip
        config = EngineConfig(
            model_dir=model, slots=options.adapters, max_rank=options.rank, kv_cache_bytes=0, host_cache_bytes=8 << 30
        )
        rows = measure(config, kinds, options.rounds, options.engines)
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
