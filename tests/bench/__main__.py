"""`make bench`: every benchmark that this machine can run, one after the other.

With a GPU at the real sizes, results in tests/bench/results. Without one the engine's throughput says nothing and is
left out, and the others run small, their results thrown away. Those that start a cluster are run by themselves:
`python -m tests.bench.http` and `soak` want one GPU, `cluster` one for each replica, `churn` and `listing` none. So are
`loads`, `thrash` and `fair`, which want the engine for themselves. `policy` and `simulate` want no GPU; the kept
simulations are of 1,000 replicas and take some minutes.
"""

import subprocess
import sys
import tempfile

import torch
from rich.console import Console

GPU: dict[str, list[str]] = {
    "engine": [], "fidelity": ["--backends", "native", "csgmv", "merged"], "kernels": [], "profile": [], "buckets": [],
}  # fmt: skip
CPU = {"fidelity": ["--layers", "1"], "kernels": ["--tiny"], "policy": [], "simulate": ["--replicas", "20"]}


def main() -> int:
    """Run each in a process of its own, so that none finds the GPU's memory taken; the first failure's status."""
    console, gpu = Console(), torch.cuda.is_available()
    console.print("on " + (torch.cuda.get_device_name() if gpu else "the CPU: small sizes, results are not kept"))
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
