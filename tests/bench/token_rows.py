"""Slot memory and load time of adapters with 100 trained tokens each, relative to equal adapters without."""

import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model


def add_rows(folder: Path, tokens: int) -> None:
    """Give an adapter rows of its own for the first tokens of the vocabulary."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": list(range(tokens))}))
    tensors = load_file(weights)
    prefix, _, _ = next(iter(tensors)).partition("layers.")
    dtype = next(iter(tensors.values())).dtype
    rows = (0.02 * torch.randn(tokens, QWEN3_EMBEDDING_06B.hidden)).to(dtype)
    save_file({**tensors, f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta": rows}, weights)


def measure(config: EngineConfig, kinds: dict[str, list[AdapterRef]], rounds: int) -> list[dict[str, Any]]:
    """Load the adapters of each kind in turn into an engine with a slot for each adapter of a kind.

    In the first round adapters come from disk, later from host memory, since those of the other kind took the slots.
    """
    engine = Engine(config)
    engine.start()
    pool, seconds = engine.runner.pool, {name: {"disk": list[float](), "host": list[float]()} for name in kinds}
    memory: dict[str, float] = {}
    for turn in range(rounds):
        for name, adapters in kinds.items():
            for adapter in track(adapters, description=f"{name}, round {turn + 1}"):
                began_s = perf_counter()
                engine.load(adapter)
                seconds[name]["host" if turn else "disk"].append(perf_counter() - began_s)
            memory.setdefault(name, pool.nbytes / config.slots)
    engine.stop()
    first = next(iter(kinds))
    return [
        {
            "adapters": f"{len(adapters)} {name}", "slot_mb": round(memory[name] / 1e6, 2),
            "slot_share": round(memory[name] / memory[first], 3),
            **{
                f"{tier}_{unit}": round(median(found) * factor / (median(seconds[first][tier]) if relative else 1), 3)
                for tier, found in seconds[name].items()
                for unit, factor, relative in (("ms", 1e3, False), ("share", 1, True))
            },
        }
        for name, adapters in kinds.items()
    ]  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "token-rows-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--adapters", type=int, default=20, help="number of adapters of each kind")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--tokens", type=int, default=100, help="trained tokens of an adapter")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each adapter, the first one from disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        shape = {"layers": options.layers, "rank": options.rank, "modules": LINEAR_MODULES}
        plain = write_adapters(folder / "plain", options.adapters, **shape)
        trained = write_adapters(folder / "tokens", options.adapters, **shape)
        for each in trained:
            add_rows(each, options.tokens)
        kinds = {"plain": refs(plain), "with tokens": [
            AdapterRef(f"tokens-{each.name}", each.path, each.revision) for each in refs(trained)
        ]}  # fmt: skip
        config = EngineConfig(
            model_dir=model, slots=options.adapters, max_rank=options.rank, kv_cache_bytes=0, host_cache_bytes=8 << 30
        )
        rows = measure(config, kinds, options.rounds)
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
