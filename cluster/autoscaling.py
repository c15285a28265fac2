"""How many replicas Ray Serve's autoscaler should run: by the work they do and the wait in their queues, in tokens.

Serve's own policy counts requests, and one of 8,000 tokens is not like one of 10. In the deployment's
`autoscaling_config`: `policy: {policy_function: ranklet.cluster.autoscaling:by_work}`. Delays, smoothing are Serve's.
"""

from collections.abc import Mapping
from typing import Any

BUSY, WAIT_S = "busy", "wait_s"  # what `Replica.record_autoscaling_stats` tells
TARGET_BUSY = 0.75  # share of the time that a device should compute
TARGET_WAIT_S = 0.5  # longer queues ask for more replicas, up to
MOST_GROWTH = 2.0  # times as many in one decision


def by_work(ctx: Any) -> tuple[float, dict[str, Any]]:
    """The number of replicas wanted, a fraction that Serve rounds; as many as now where nothing is known.

    Args:
        ctx: Serve's AutoscalingContext.
    """
    told: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
    busy, wait_s = _mean(told.get(BUSY)), _mean(told.get(WAIT_S))
    if busy is None or wait_s is None or ctx.current_num_replicas == 0:
        return ctx.target_num_replicas, ctx.policy_state
    factor = max(busy / TARGET_BUSY, wait_s / TARGET_WAIT_S)
    return ctx.current_num_replicas * min(factor, MOST_GROWTH), ctx.policy_state


def _mean(values: Mapping[Any, float] | None) -> float | None:
    return sum(values.values()) / len(values) if values else None
