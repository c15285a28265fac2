"""The only place where tests use private names of Ray. Each entry gives the reason."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray.serve.generated.serve_pb2 import ASGIRequest  # type: ignore[attr-defined]  # made when it is imported
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub
from ray.serve.request_router import PendingRequest, RequestRouter

# Tests build a RequestRouter, which is public; its arguments DeploymentID and DeploymentHandleSource are private.
__all__ = [
    "DeploymentHandleSource",
    "DeploymentID",
    "bound_deployments",
    "call_replica",
    "pending_request",
    "queue_and_dequeue",
    "write_haproxy_configuration",
]


def bound_deployments(application: Any) -> set[str]:
    """Return the names of an application's deployments. Ray has no public way to list them before they run."""
    deployment = application._bound_deployment
    nested = [bound_deployments(value) for value in deployment.init_args if hasattr(value, "_bound_deployment")]
    return {deployment.name}.union(*nested)


def call_replica(port: int, pickled: bytes, *headers: tuple[str, str]) -> Any:
    """Call the gRPC server of a replica of Serve, which other replicas call. Returns the status code of a refusal."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = ASGIRequest(pickled_request_metadata=pickled)
        try:
            ASGIServiceStub(channel).HandleRequest(request, timeout=10, metadata=headers)
        except grpc.RpcError as error:
            return error.code()
    return None


def pending_request(args: list[Any], kwargs: dict[str, Any], **options: Any) -> PendingRequest:
    """Build a request as a handle gives it to its router. Its constructor needs a RequestMetadata, which is private."""
    metadata = RequestMetadata(request_id="1", internal_request_id="1", **options)
    return PendingRequest(args=args, kwargs=kwargs, metadata=metadata)


def queue_and_dequeue(router: RequestRouter, request: PendingRequest) -> None:
    """Run the bookkeeping around one routing decision. Ray runs it only inside its event loop, beside live replicas."""
    router._add_pending_request_to_indices(request)
    router._remove_pending_request_from_indices(request)


def write_haproxy_configuration(
    folder: Path, ports: tuple[int, int, int], gateways: Mapping[str, Sequence[int]]
) -> Path:
    """Write what Serve gives to HAProxy. Only its actor for HAProxy, in a running cluster, does that otherwise.

    Args:
        folder: for HAProxy's files.
        ports: of HTTP, metrics and statistics.
        gateways: ports of the gateways of each route prefix.
    """
    http, metrics, stats = ports
    configuration = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=http), metrics_port=metrics, stats_port=stats, is_head=True,
        socket_path=str(folder / "admin.sock"), metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder), server_state_file=str(folder / "server-state"),
    )  # fmt: skip
    backends = {
        f"http-{number}": BackendConfig(
            name=f"http-{number}", path_prefix=prefix, app_name=f"app-{number}", http_health_check_path="/health",
            health_check_inter="1s", health_check_fall=3,
            servers=[ServerConfig(name=f"gateway{port}", host="127.0.0.1", port=port) for port in served],
        )
        for number, (prefix, served) in enumerate(gateways.items())
    }  # fmt: skip
    path = folder / "haproxy.cfg"
    HAProxyApi(configuration, backends, str(path))._generate_config_file_internal()
    return path
