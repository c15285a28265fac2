"""Throughput of the engine on one GPU with plain LoRA, with DoRA, and with both in the same batches."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench import report
from tests.bench.engine import LENGTHS, refs, throughput
from tests.bench.own_engine import own_engine
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model

_RUNS = 3  # of each case in turn, since a GPU at its power limit drifts
Owners = list[AdapterRef | None]


def cases(plain: list[AdapterRef], dora: list[AdapterRef]) -> dict[str, Owners]:
    """Return equally many adapters of each kind. Plain and DoRA take turns in "mixed"."""
    pairs = zip(plain, dora, strict=True)
    mixed = [pair[i % 2] for i, pair in enumerate(pairs)]
    return {"plain": list(plain), "mixed": list(mixed), "dora": list(dora)}


def measure(engine: Engine, owners: dict[str, Owners], length: int, batches: int) -> list[dict[str, Any]]:
    """Return a row for each case; `share` is its rate relative to plain LoRA."""
    rates: dict[str, list[int]] = {name: [] for name in owners}
    for _ in range(_RUNS):
        for name, adapters in owners.items():
            rates[name].append(throughput(engine, adapters, length, batches)["tokens_per_s"])
    plain = median(rates["plain"])
    return [
        {
            "adapters": f"{len(owners[name])} {name}", "tokens": length, "tokens_per_s": median(found),
            "share": round(median(found) / plain, 3),
        }
        for name, found in rates.items()
    ]  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "dora-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--adapters", type=int, default=64, help="number of adapters")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--batches", type=int, default=24, help="full batches of each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        made = {
            kind: refs(
                write_adapters(
                    folder / kind, options.adapters, layers=options.layers, rank=options.rank, modules=LINEAR_MODULES,
                    dora=kind == "dora",
                )
            )
            for kind in ("plain", "dora")
        }  # fmt: skip
        renamed = [AdapterRef(f"dora-{each.name}", each.path, each.revision) for each in made["dora"]]
        config = EngineConfig(
            model_dir=model, slots=2 * options.adapters, max_batch_tokens=30_720, max_rank=options.rank,
            host_cache_bytes=16 << 30,
        )  # fmt: skip
        with own_engine(config) as engine:
            for ref in track([*made["plain"], *renamed], description="loading adapters"):
                engine.load(ref)
            owners = cases(made["plain"], renamed)
            rows = [
                row
                for length in track(LENGTHS, description="measuring")
                for row in measure(engine, owners, length, options.batches)
            ]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
