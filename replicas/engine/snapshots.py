"""Describes what an engine holds and does at one moment."""

from collections.abc import Sequence as Many

from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.engine.scheduler import Scheduler
from ranklet.replicas.engine.sequence import Sequence, adapter_names, count_requests
from ranklet.replicas.engine.stats import Snapshot


def snapshot_of(
    scheduler: Scheduler, in_steps: Many[Sequence], adapters: AdapterManager, *, slots: int, pool_bytes: int
) -> Snapshot:
    """Return a snapshot. Called under the engine's lock.

    Args:
        in_steps: sequences that are launched or on the device.
    """
    started, waiting = list[Sequence](), list[Sequence]()
    for sequence in scheduler.waiting():
        (waiting if sequence.row is None else started).append(sequence)
    running, held = [*in_steps, *started], adapters.held()
    return Snapshot(
        resident=held.resident, hosted=held.hosted,
        waiting_requests=count_requests(waiting), waiting_tokens=scheduler.queue.tokens,
        waiting_sequences=len(waiting), running_requests=count_requests(running),
        waiting_adapters=adapter_names(waiting), running_adapters=adapter_names(running),
        slots=slots, pool_bytes=pool_bytes, host_bytes=adapters.host_bytes,
        pinned=tuple(sorted(adapters.pinned)), kv_cache=scheduler.kv_state(),
    )  # fmt: skip
