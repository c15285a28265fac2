"""Run the tuner on the shapes of the shipped tables, without their models."""

import argparse
from pathlib import Path

from ranklet.kernels.tuning.tune import tune
from tests.bench.shapes import LLAMA_31_8B, QWEN3_EMBEDDING_06B

SHAPES = {"qwen3-embedding-0.6b": QWEN3_EMBEDDING_06B, "llama-3.1-8b": LLAMA_31_8B}


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.tune", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models to tune for")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="LoRA ranks")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="tune only batches of these numbers of rows")
    parser.add_argument("--no-crossovers", action="store_true", help="do not compare the backends' times")
    parser.add_argument("--out", type=Path, help="table to write (default: that of this GPU, beside the kernels)")
    options = parser.parse_args()
    for name in options.shapes:
        dims, crossovers = SHAPES[name].module_dims(), not options.no_crossovers
        print(name, tune(dims, options.ranks, path=options.out, rows=options.rows, crossovers=crossovers))


if __name__ == "__main__":
    main()
