"""Policy for Ray Serve's autoscaler: the number of replicas follows their work and what requests wait for.

Serve's own policy counts requests, whether they have 10 tokens or 8,000. Set this policy in the deployment's
`autoscaling_config`: `policy: {policy_function: ranklet.cluster.autoscaling:by_work}`. Serve applies its own delays and
smoothing. A replica that is removed ends its texts, or hands them to others, within its `graceful_shutdown_timeout_s`.
"""

from collections.abc import Mapping
from typing import Any

# Keys of `Replica.record_autoscaling_stats`, and the means over all replicas that the policy keeps them at.
BUSY = "busy"  # share of the time in which a device computes, less where it runs few texts
WAIT_S = "wait_s"  # until waiting prompts are computed and waiting texts run; not of texts that have begun
KV_USED = "kv_used"  # share of the pages of keys and values that sequences use
FIRST_TOKEN_S = "first_token_s"  # of the texts that have ended since the last report; missing if none have
TARGETS = {BUSY: 0.75, WAIT_S: 0.5, KV_USED: 0.8, FIRST_TOKEN_S: 1.0}
MAX_GROWTH = 2.0  # largest factor of one decision

Measured = Mapping[str, Mapping[Any, float]]  # by key and replica


def by_work(ctx: Any) -> tuple[float, dict[str, Any]]:
    """Return the wanted number of replicas, which Serve rounds.

    Args:
        ctx: Serve's AutoscalingContext.
    """
    wanted = wanted_replicas(ctx.aggregated_metrics or {}, ctx.current_num_replicas, ctx.target_num_replicas)
    return wanted, ctx.policy_state


def wanted_replicas(measured: Measured, current: int, target: int) -> float:
    """Return how many replicas would bring the worst mean to its target. Without measurements, `target` stays."""
    means = {key: sum(values.values()) / len(values) for key in TARGETS if (values := measured.get(key))}
    if BUSY not in means or WAIT_S not in means or current == 0:
        return target
    return current * min(max(mean / TARGETS[key] for key, mean in means.items()), MAX_GROWTH)
