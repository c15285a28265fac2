"""Policy for Ray Serve's autoscaler: the number of replicas follows their utilisation and the wait in their queues.

Serve's own policy counts requests, whether they have 10 tokens or 8,000. Set this policy in the deployment's
`autoscaling_config`: `policy: {policy_function: ranklet.cluster.autoscaling:by_work}`. Serve applies its own delays and
smoothing.
"""

from collections.abc import Mapping
from typing import Any

BUSY, WAIT_S = "busy", "wait_s"  # keys of `Replica.record_autoscaling_stats`
TARGET_BUSY = 0.75  # share of the time in which a device computes
TARGET_WAIT_S = 0.5
MAX_GROWTH = 2.0  # largest factor of one decision


def by_work(ctx: Any) -> tuple[float, dict[str, Any]]:
    """Return the wanted number of replicas, which Serve rounds. Without measurements, it stays at the current target.

    Args:
        ctx: Serve's AutoscalingContext.
    """
    metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
    busy, wait_s = _mean(metrics.get(BUSY)), _mean(metrics.get(WAIT_S))
    if busy is None or wait_s is None or ctx.current_num_replicas == 0:
        return ctx.target_num_replicas, ctx.policy_state
    factor = max(busy / TARGET_BUSY, wait_s / TARGET_WAIT_S)
    return ctx.current_num_replicas * min(factor, MAX_GROWTH), ctx.policy_state


def _mean(values: Mapping[Any, float] | None) -> float | None:
    return sum(values.values()) / len(values) if values else None
