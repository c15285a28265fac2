"""Time of each stage of a batch beside its roofline floor, as `ranklet profile` prints it, at real sizes."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ranklet.cluster.command.profile import parse_lengths, show
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.profiling.profiler import Profile, profile
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model

COLUMNS = ("stage", "ms", "floor_ms", "bound", "lora_ms", "lora_floor_ms", "launch_ms", "TFLOP/s", "TB/s")


def rows_of(found: Profile, prompts: str) -> list[dict[str, Any]]:
    whole = {"stage": "whole batch", "ms": found.base_ms, "lora_ms": found.lora_ms - found.base_ms}
    whole |= {"floor_ms": found.floor_ms, "launch_ms": found.launch_ms}
    whole |= {"TFLOP/s": found.ceilings.operations_per_s / 1e12, "TB/s": found.ceilings.bytes_per_s / 1e12}
    stages = [{"stage": stage.name} | dataclasses.asdict(stage) for stage in found.stages]
    return [{"prompts": prompts} | {column: row.get(column, "") for column in COLUMNS} for row in (*stages, whole)]


def main() -> None:
    parser = report.parser(__doc__, "profile-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument(
        "--prompts", nargs="+", default=["5x6144", "60x512", "1x6144"], help="batches to profile, as COUNTxTOKENS"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        made = refs(write_adapters(folder / "adapters", 4, layers=options.layers))
        config = EngineConfig(model, slots=4, max_batch_tokens=30_720, lora_modules=ATTENTION)
        for group in options.prompts:
            found = profile(config, made, parse_lengths([group]))
            show(found, Console(width=120))
            rows += rows_of(found, group)
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
