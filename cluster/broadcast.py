"""Calls to all replicas of a deployment."""

from collections.abc import Sequence
from typing import Any

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

CONTROL_TIMEOUT_S = 5.0


async def broadcast(
    handle: "DeploymentHandle[Any]", method: str, *arguments: Any, timeout_s: float = CONTROL_TIMEOUT_S,
    missing: Sequence[Any] = (),
) -> list[Any]:  # fmt: skip
    """Call `method` of every live replica of a deployment and collect the results.

    Args:
        missing: takes the place of the result of each replica that fails or does not answer within `timeout_s`. Stands
            for the whole result when there is no replica.
    """
    try:
        results = handle.broadcast(method, *arguments).results_async(timeout_s=timeout_s, return_exceptions=True)
        collected: list[Any] = []
        for result in await results:
            collected += missing if isinstance(result, BaseException) else [result]
    except (RayError, RayServeException, grpc.RpcError, TimeoutError):
        return list(missing)
    return collected
