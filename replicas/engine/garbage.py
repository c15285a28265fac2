"""The garbage collector of a process that runs an engine."""

import gc


def freeze_garbage_collector() -> None:
    """Exempt all present objects from garbage collection.

    PyTorch makes most of the 300,000 objects. Each collection that visits them delays launches by 0.2 s on a slow core.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the collector's counts, so that only new objects trigger it
