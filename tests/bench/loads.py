"""Latency of the first answer for an adapter in a slot, in host memory or on disk, idle and beside traffic.

Before each load from disk the files are dropped from the page cache, and then hashed as a replica hashes files that are
new to it. Each request has one prompt of 16 tokens. The first one follows the engine's start, so its time includes
everything that the warm-up left out.
"""

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from tests.bench import report
from tests.bench.engine import embed, refs
from tests.bench.own_engine import own_engine
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model

_MODULES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_BATCH = 60  # prompts of 512 tokens in flight beside the loads
_SLOTS = 4


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_answers(engine: Engine, adapters: Sequence[AdapterRef], tier: str) -> NDArray[np.float64]:
    """Return the milliseconds to the revision and to the answer of each adapter, checking that it was in `tier`."""
    prompt = np.arange(1, 17, dtype=np.int32)
    took_s = []
    for adapter in adapters:
        if tier == "disk":
            forget(Path(adapter.path) / WEIGHTS_FILE)
        began_s = perf_counter()
        ref = Revisions().reference(adapter.name, adapter.path) if tier == "disk" else adapter
        named_s = perf_counter()
        (answer,) = embed(engine, [prompt], [ref])
        took_s.append((named_s - began_s, perf_counter() - began_s))
        if answer.tier != tier:
            raise RuntimeError(f"expected {adapter.name} in tier {tier}, got {answer.tier}")
    return np.array(took_s) * 1e3


def rows(engine: Engine, adapters: Sequence[AdapterRef], megabytes: float, beside: str) -> list[dict[str, Any]]:
    """Return a row for each tier. There are fewer slots than adapters, so earlier ones are back in host memory."""
    found = []
    for tier, refs_of_tier in (("disk", adapters), ("host", adapters), ("gpu", [adapters[-1]] * len(adapters))):
        named_ms, took_ms = first_answers(engine, refs_of_tier, tier).T
        found.append({
            "beside": beside, "tier": tier, "adapter_MB": megabytes, "loads": len(took_ms),
            "p50_ms": float(np.median(took_ms)), "p99_ms": float(np.percentile(took_ms, 99)),
            "max_ms": float(took_ms.max()), "of which the revision": float(np.median(named_ms)),
        })  # fmt: skip
    return found


def main() -> None:
    parser = report.parser(__doc__, "loads-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--turns", type=int, default=20, help=f"loads of each row, more than {_SLOTS}")
    options = parser.parse_args()
    if options.turns <= _SLOTS:  # the last adapters would still be in slots
        parser.error(f"--turns: expected more than the engine's {_SLOTS} slots, got {options.turns}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", layers=options.layers)
        made = write_adapters(folder / "adapters", 2 * options.turns + 1, layers=options.layers, modules=_MODULES)
        os.sync()  # the disk would still write them during the first loads
        size = (made[0] / WEIGHTS_FILE).stat().st_size / 1e6
        *some, busy = refs(made)
        config = EngineConfig(folder / "model", slots=_SLOTS, lora_modules=_MODULES, host_cache_bytes=16 << 30)
        began_s = perf_counter()
        with own_engine(config) as engine:
            started_s = perf_counter() - began_s
            found = rows(engine, some[: options.turns], size, "nothing")
            found += beside_traffic(engine, some[options.turns :], busy, size)
            found = [{**row, "start_s": started_s} for row in found]
    report.save(options.name, found, options.out)


def beside_traffic(
    engine: Engine, adapters: Sequence[AdapterRef], busy: AdapterRef, size: float
) -> list[dict[str, Any]]:
    stop = threading.Event()
    prompts = [np.arange(1, 513, dtype=np.int32)] * (_BATCH // 2)

    def traffic() -> None:
        while not stop.is_set():
            embed(engine, prompts, [busy] * len(prompts))

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        return rows(engine, adapters, size, "batches of 512 tokens")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
