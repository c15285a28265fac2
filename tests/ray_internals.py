"""The only place where tests use private names of Ray. Each entry gives the reason."""

from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter

# Tests build a RequestRouter, which is public; its arguments DeploymentID and DeploymentHandleSource are private.
__all__ = [
    "DeploymentHandleSource",
    "DeploymentID",
    "bound_deployments",
    "pending_request",
    "queue_and_dequeue",
]


def bound_deployments(application: Any) -> set[str]:
    """Return the names of an application's deployments. Ray has no public way to list them before they run."""
    deployment = application._bound_deployment
    nested = [bound_deployments(value) for value in deployment.init_args if hasattr(value, "_bound_deployment")]
    return {deployment.name}.union(*nested)


def pending_request(args: list[Any], kwargs: dict[str, Any], **options: Any) -> PendingRequest:
    """Build a request as a handle gives it to its router. Its constructor needs a RequestMetadata, which is private."""
    metadata = RequestMetadata(request_id="1", internal_request_id="1", **options)
    return PendingRequest(args=args, kwargs=kwargs, metadata=metadata)


def queue_and_dequeue(router: RequestRouter, request: PendingRequest) -> None:
    """Run the bookkeeping around one routing decision. Ray runs it only inside its event loop, beside live replicas."""
    router._add_pending_request_to_indices(request)
    router._remove_pending_request_from_indices(request)
