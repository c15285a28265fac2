"""An engine in a benchmark's own process, which runs as it would in a process of its own."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.garbage import freeze_garbage_collector
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.process.worker import SWITCH_INTERVAL_S


@contextmanager
def own_engine(config: EngineConfig, listener: Listener | None = None) -> Iterator[Engine]:
    """Start an engine. Frees the device's memory at the end.

    Without the settings of an engine's process, other threads and the garbage collector delay the thread that launches
    steps, by 5 ms and 0.3 s, and the device waits.
    """
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    engine = Engine(config, listener)
    try:
        engine.start()
        freeze_garbage_collector()
        yield engine
    finally:
        engine.stop()
        del engine
        gc.unfreeze()
        gc.collect()
        sys.setswitchinterval(interval_s)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
