"""A node with a gateway and a replica is lost or silent: only what its gateway worked on ends early, and soon."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster import load
from tests.cluster.nodes import Node, paused, process_tree, serving_on_nodes
from tests.cluster.service import BASE, Service, eventually, text_configuration
from tests.cluster.stream_load import StreamLoad, stream_requests
from tests.needs import require

Nodes = tuple[Service, list[Node], Path]
STREAMS = 16
ENDS_S = 40.0  # longest time until nothing comes from the lost node: 4 s with idle cores
SILENT_S = 15.0  # HAProxy passes over a gateway after 4 s with idle cores, and must not end its requests then
QUIET_S = 3.0  # in which all requests must be answered afterwards


@pytest.fixture(scope="module")
def nodes(runs_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """HAProxy on the head, a gateway and a replica on each of the two other nodes."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("lost")
    content = text_configuration(folder)
    gateway, replica = content["applications"][0]["deployments"]
    gateway |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1, "resources": {"gateway": 1}}}
    replica |= {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0.5, "resources": {"engine": 1}}}
    with serving_on_nodes(content, folder, {"RANKLET_SILENT_GATEWAY_S": f"{SILENT_S:g}"}) as (service, started):
        wait_for_both(service)
        yield service, started, folder


def wait_for_both(service: Service) -> None:
    load.wait_for_two(service)
    load.wait_for_gateways(service, 2)


@pytest.fixture(scope="module")
def streams(nodes: Nodes) -> StreamLoad:
    requests = stream_requests([BASE], 4, 800)
    return StreamLoad(nodes[0].url, [fields | {"max_tokens": max(fields["max_tokens"], 600)} for fields in requests])


def test_only_what_a_lost_gateway_worked_on_ends_early(nodes: Nodes, streams: StreamLoad) -> None:
    service, started, _ = nodes
    with streams.running(STREAMS, most=STREAMS):
        cut, _ = begun(service, streams, started[0])
        started[0].kill()
        lost_s = time.monotonic()
        ask_until_quiet(service)
        eventually("streams of the lost gateway have ended", lambda: streams.verdicts["failed"] == cut, poll_s=0.05)
        assert time.monotonic() - lost_s < ENDS_S + QUIET_S
    judge(streams, cut)


def test_only_what_a_silent_gateway_worked_on_ends_early(nodes: Nodes, streams: StreamLoad) -> None:
    """The other gateway is silent for a shorter time, as on a machine without CPU time. Its streams go on."""
    service, started, folder = nodes
    if started[0].process.poll() is not None:
        started[0] = Node(service.cluster, folder / "node2.log", 2)
        wait_for_both(service)
    streams.clear()
    haproxy = int(service.cluster.ray_environment["RAY_SERVE_HAPROXY_METRICS_PORT"])
    with streams.running(STREAMS, most=STREAMS):
        cut, other = begun(service, streams, started[0])
        with started[0].silent():
            silent_s = time.monotonic()
            with paused(other):
                eventually("HAProxy passes over both", lambda: load.gateways_down(haproxy) == 2, poll_s=0.05)
                assert not streams.ended
            eventually("HAProxy knows the other again", lambda: load.gateways_down(haproxy) == 1, poll_s=0.05)
            ask_until_quiet(service)
            eventually("streams of the silent one have ended", lambda: streams.verdicts["failed"] == cut, poll_s=0.05)
            assert time.monotonic() - silent_s < SILENT_S + ENDS_S
    judge(streams, cut)


def begun(service: Service, streams: StreamLoad, node: Node) -> tuple[int, int]:
    """Wait until all streams have begun. Returns how many the node's gateway has, and the other gateway's process."""
    eventually("all streams have begun", lambda: streams.opened.total() == STREAMS, poll_s=0.02)
    pids, in_flight = service.processes("Gateway"), load.of_gateways(service, "ranklet_requests_in_flight")
    assert sum(in_flight.values()) == STREAMS, "the texts are too short for this test"
    on_node = set(process_tree(node.process.pid))
    (lost,) = (id for id in in_flight if pids[id] in on_node)
    (other,) = in_flight.keys() - {lost}
    assert 0 < in_flight[lost] < STREAMS
    return in_flight[lost], pids[other]


def judge(streams: StreamLoad, cut: int) -> None:
    assert streams.verdicts == {"failed": cut, "right": STREAMS - cut}, (streams.verdicts, streams.errors)
    assert all(error.startswith("ClientPayloadError") for error in streams.errors), streams.errors
    assert streams.pause_s < ENDS_S


def ask_until_quiet(service: Service) -> None:
    """Send requests to the front door until it has sent none to the lost node for a while."""
    began_s = failed_s = time.monotonic()
    while time.monotonic() - failed_s < QUIET_S:
        assert time.monotonic() - began_s < ENDS_S + QUIET_S, "the front door still sends requests to the lost node"
        if not is_answered(service):
            failed_s = time.monotonic()
        time.sleep(0.05)


def is_answered(service: Service) -> bool:
    """Return whether a request is answered. Else the connection was closed, or a status says to send it again."""
    body = {"model": BASE, "prompt": "text"}
    try:
        answer = httpx.post(f"{service.url}/tokenize", json=body, timeout=ENDS_S, trust_env=False)
    except httpx.RemoteProtocolError:
        return False
    if answer.status_code != 200:
        assert answer.status_code in (502, 503), answer.text
        assert answer.json()["error"]["code"] == "unavailable"
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code == 200
