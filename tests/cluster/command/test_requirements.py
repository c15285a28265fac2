"""What a configuration needs: resources that Ray must have, and a free port."""

import socket
from typing import Any

import pytest
import yaml

from ranklet.cluster.command.requirements import missing_resources, port_problem
from tests.cluster.service import ROOT

TEMPLATE = yaml.safe_load((ROOT / "deploy" / "config.yaml").read_text())


def of(*deployments: dict[str, Any]) -> dict[str, Any]:
    return {"applications": [{"name": "ranklet", "deployments": list(deployments)}]}


def test_the_template_names_what_it_lacks_on_a_small_machine() -> None:
    cpus, gpus = missing_resources(TEMPLATE, {"CPU": 2.0, "memory": 1e9})
    assert "need 16 CPUs (Gateway: 8 x 1, Replica: 4 x 2), there are 2" in cpus
    assert "need 4 GPUs (Replica: 4 x 1), there are 0" in gpus
    assert missing_resources(TEMPLATE, {"CPU": 16.0, "GPU": 4.0}) == []


@pytest.mark.parametrize(
    ("replica", "gpus", "missing"),
    [
        ({"num_replicas": 2, "ray_actor_options": {"num_cpus": 0, "num_gpus": 0.5}}, 1, 0),
        ({"num_replicas": 3, "ray_actor_options": {"num_cpus": 0, "num_gpus": 0.5}}, 1, 1),
        ({"ray_actor_options": {"num_cpus": 0, "num_gpus": 1}, "autoscaling_config": {"min_replicas": 2}}, 1, 1),
        ({"ray_actor_options": {"num_cpus": 0, "num_gpus": 1}, "autoscaling_config": {"max_replicas": 9}}, 1, 0),
        ({"ray_actor_options": {"num_cpus": 0, "resources": {"disk": 1}}}, 1, 0),  # of a node that joins later
    ],
)
def test_shares_and_scaling_count_and_resources_of_other_nodes_do_not(
    replica: dict[str, Any], gpus: int, missing: int
) -> None:
    found = missing_resources(of({"name": "Replica", **replica}), {"CPU": 2.0, "GPU": float(gpus)})
    assert len(found) == missing, found


def test_deployments_that_the_file_does_not_list_count_with_their_defaults() -> None:
    assert missing_resources(of(), {"CPU": 2.0}) == []
    (found,) = missing_resources(of(), {"CPU": 1.0})
    assert "need 2 CPUs (Gateway: 1 x 1, Replica: 1 x 1), there are 1" in found


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_named(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        problem = port_problem(host, port, patience_s=0)
        assert problem is not None
        assert f"{port} on {host} is in use" in problem
    assert port_problem(host, port) is None


def test_an_address_of_another_machine_is_named() -> None:
    problem = port_problem("203.0.113.7", 8000)
    assert problem is not None
    assert "203.0.113.7:8000" in problem
    assert "in use" not in problem
