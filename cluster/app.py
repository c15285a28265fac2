"""The application: gateways in front of engine replicas. `build` is the import_path in deploy/*.yaml."""

import logging
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import ROUTER, SHUTDOWN_TIMEOUTS_S, DataPath, refuse_missing_token
from ranklet.cluster.ingress.gateway import Gateway
from ranklet.cluster.replica.deployment import Replica
from ranklet.cluster.replica.gateways_client import GATEWAY

# Serve's own limits are too high to be reached: Serve polls a full replica (every 25 ms to 0.5 s), and a full gateway
# answers in plain text. engine.max_waiting_tokens and limits.max_in_flight_requests limit the load instead.
_ONGOING = 10_000
_QUEUED = 20_000
_COMMON: dict[str, Any] = {
    "num_replicas": 1,
    "ray_actor_options": {"num_cpus": 1},
    "health_check_period_s": 1,  # a dead process is replaced after about two seconds
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.5,
}

logger = logging.getLogger("ray.serve")


def build(args: AppArgs) -> Application:
    """Build the application. YAML files can override the options of its two deployments.

    Raises:
        ValidationError: see `AppArgs`.
        RuntimeError: Ray's token is off. Serve calls this before it starts any process of the application.
    """
    args = args.resolved()
    refuse_missing_token(open_ray=args.security.open_ray)
    logger.info("ranklet serves %s; %s", args.base_names[0], DataPath.current().summary())
    # A path instead of the class, which Ray would pickle into the configuration of the deployment.
    router = RequestRouterConfig.model_validate({"request_router_class": ROUTER})
    replica = serve.deployment(
        name="Replica",
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        request_router_config=router,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUTS_S["Replica"],
        **_COMMON,
    )(Replica)
    gateway = serve.deployment(
        name=GATEWAY,
        max_ongoing_requests=_QUEUED,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUTS_S[GATEWAY],
        **_COMMON,
    )(Gateway)
    return gateway.bind(args, replica.bind(args))
