"""`make bench`: run the benchmarks that fit this machine, one after the other.

On a GPU machine they run at full size and write to tests/bench/results. On a CPU they run at small sizes, the engine's
throughput is left out, and the results are discarded. Run the other benchmarks one at a time with
`python -m tests.bench.NAME`: `dora`, `token_rows`, `http`, `soak`, `loads`, `thrash` and `fair` need one GPU, `cluster`
needs one for each replica, `churn` and `listing` need none. `--help` shows the options of each. The committed
simulations have 1,000 replicas and take several minutes. `compare` compares two folders of results, and `page` writes
the page of results.
"""

import subprocess
import sys
import tempfile

import torch
from rich.console import Console

GPU: dict[str, list[str]] = {
    "engine": [], "fidelity": ["--backends", "native", "csgmv", "merged"], "kernels": [], "profile": [], "buckets": [],
    "generate": [], "fidelity_text": ["--models", "0.6B", "8B"],
    "sampler": [], "grammar": [], "rerank": [],
}  # fmt: skip
CPU = {
    "fidelity": ["--layers", "1"], "kernels": ["--tiny"], "policy": [], "simulate": ["--replicas", "20"],
    "generate": ["--shapes", "tiny"], "grammar": ["--shapes", "tiny"],
    "fidelity_text": ["--models", "tiny", "--output", "8"],
    "rerank": ["--layers", "1", "--documents", "4", "--tokens", "30", "--requests", "2"],
}  # fmt: skip


def main() -> int:
    """Run each benchmark in its own process, which frees the GPU's memory. Returns 1 if one of them failed."""
    console, gpu = Console(), torch.cuda.is_available()
    console.print("on " + (torch.cuda.get_device_name() if gpu else "the CPU: small sizes, results are discarded"))
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in (GPU if gpu else CPU).items():
            console.rule(f"[bold]{name}")
            where = [] if gpu else ["--out", scratch]
            if subprocess.run([sys.executable, "-m", f"tests.bench.{name}", *options, *where], check=False).returncode:
                failed.append(name)
    console.rule("done" if not failed else f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
