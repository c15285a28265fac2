"""Things die, hang and change on a cluster of three nodes under load: every request ends, and ends rightly."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ranklet.cluster.command.local_cluster import LocalCluster
from tests.assets.hanging import hanging
from tests.cluster import load
from tests.cluster.gcs import Gcs, redis_server
from tests.cluster.load import LoadResult
from tests.cluster.nodes import Node, child_processes, command_line, process_tree
from tests.cluster.service import Service, eventually, own_configuration, serving, vectors_of
from tests.needs import is_installed, needs, require

Nodes = tuple[Service, list[Node], Path]
ENDS_S = 10.0  # a request, after a fault
BACK_S = 30.0  # the replicas, after one was lost


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where the GCS keeps what it knows: in a Redis, if one is installed, else in itself."""
    if not is_installed("redis-server"):
        yield {}
        return
    with redis_server(tmp_path_factory.mktemp("redis")) as environment:
        yield environment


@pytest.fixture(scope="module")
def nodes(
    model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory, kept: dict[str, str]
) -> Iterator[Nodes]:
    """Two gateways, which a deploy replaces in turn, HAProxy on the head; two nodes with room for two replicas each."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("nodes")
    content = own_configuration(model_dir, adapters_dir, folder)
    gateway, replica = content["applications"][0]["deployments"]
    gateway["num_replicas"] = 2
    gateway["ray_actor_options"] = {"num_cpus": 0.1, "resources": {"node:__internal_head__": 0.001}}
    replica["ray_actor_options"] = {"num_cpus": 0.5, "resources": {"engine": 1}}
    replica["graceful_shutdown_timeout_s"] = 5
    content["applications"][0]["args"]["engine"]["load_timeout_s"] = 3.0
    started: list[Node] = []
    over = threading.Event()
    cluster = LocalCluster(http_port=0, report=print, environment=kept)

    def join() -> None:
        """Serve waits for the nodes, and they for Ray."""
        while not cluster.is_up:
            if over.wait(0.1):
                return
        for number in range(2):
            started.append(Node(cluster, folder / f"node{number}.log", 2))

    joining = threading.Thread(target=join)
    joining.start()
    try:
        with serving(content, folder, cluster) as service:
            joining.join()
            assert len(started) == 2, "a node did not join: its error is above"
            load.wait_for_two(service)
            yield service, started, folder
    finally:
        over.set()
        joining.join()
        for node in started:
            if node.process.poll() is None:
                node.kill()


def judge(seen: LoadResult, least: int = 20) -> None:
    assert seen["wrong"] == 0
    assert seen["right"] > least
    assert seen.slowest_s < ENDS_S


@pytest.mark.parametrize("hung", ["engine", "actor"])
def test_a_replica_that_hangs_is_passed_over_and_replaced(nodes: Nodes, hung: str) -> None:
    """SIGSTOP: it takes requests and never answers."""
    service, _, _ = nodes
    actor = next(iter(service.processes("Replica").values()))
    stopped = child_processes(actor)[0] if hung == "engine" else actor
    try:
        judge(load.run_under_load(service, lambda: os.kill(stopped, signal.SIGSTOP), 18))
        eventually("another in its place", lambda: actor not in service.processes("Replica").values(), BACK_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    load.wait_for_two(service)


def test_a_node_is_lost(nodes: Nodes) -> None:
    """The other has room for its replicas."""
    service, started, folder = nodes
    judge(load.run_under_load(service, started[0].kill))
    began_s = time.monotonic()
    load.wait_for_two(service)
    assert time.monotonic() - began_s < BACK_S
    started[0] = Node(service.cluster, folder / "node2.log", 2)


def test_the_controller_is_killed(nodes: Nodes) -> None:
    """Requests go on without it, and the new one finds all as it was."""
    service, _, _ = nodes
    before = service.processes("Replica")
    judge(load.run_under_load(service, lambda: os.kill(_controller(service), signal.SIGKILL)))
    eventually("the controller answers again", lambda: service.processes("Replica") == before, BACK_S)


def _controller(service: Service) -> int:
    """Its process, found among all of this cluster's."""
    named = [
        pid for pid in process_tree(service.cluster.state.pid) if command_line(pid).startswith("ray::ServeController")
    ]
    assert len(named) == 1
    return named[0]


def test_a_disk_that_hangs_holds_up_its_own_adapter_alone(nodes: Nodes) -> None:
    service, _, _ = nodes
    stuck = service.adapters / "stuck"
    shutil.copytree(service.adapters / "legal-v2", stuck)
    with hanging(stuck / "adapter_model.safetensors"), ThreadPoolExecutor(4) as pool:
        began_s = time.monotonic()
        asked = [pool.submit(service.post, "stuck", "text") for _ in range(4)]
        judge(load.run_under_load(service, lambda: None))
        for one in asked:
            answer = one.result(timeout=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_loading"), answer.text
        assert time.monotonic() - began_s < ENDS_S
    assert (service.embed("stuck", "text") == service.embed("legal-v2", "text")).all()
    shutil.rmtree(stuck)


def test_an_adapter_is_deleted_while_it_loads(nodes: Nodes) -> None:
    """Whoever asked gets the right vector or is told that it is gone; others notice nothing."""
    service, _, _ = nodes
    expected = service.embed("medical", "text")
    for turn in range(6):
        doomed = service.adapters / f"doomed{turn}"
        shutil.copytree(service.adapters / "medical", doomed)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(service.post, doomed.name, "text", encoding_format="base64") for _ in range(3)]
            time.sleep(0.004 * turn)
            shutil.rmtree(doomed)
            for one in asked:
                answer = one.result(timeout=ENDS_S)
                if answer.status_code == 200:
                    assert abs(vectors_of(answer)[0] - expected[0]).max() < 1e-5
                else:
                    assert answer.status_code in (400, 404), answer.text
    assert abs(service.embed("medical", "text") - expected).max() < 1e-5


def test_a_new_configuration_is_deployed(nodes: Nodes) -> None:
    """Other arguments replace every process, one by one; the new ones know what was loaded by name."""
    service, _, _ = nodes
    shutil.copytree(service.adapters / "medical", service.adapters / ".sources" / "kept")
    kept = {"lora_name": "kept", "lora_path": ".sources/kept", "pinned": True}
    assert service.http.post("/v1/load_lora_adapter", json=kept).status_code == 200
    before = set(service.processes("Replica").values())
    arguments = service.content["applications"][0]["args"]
    arguments["engine"]["slots"] = 6
    judge(load.run_under_load(service, lambda: service.cluster.deploy(service.content), 30))
    eventually("all replicas are new", lambda: not before & set(service.processes("Replica").values()), 60)
    load.wait_for_two(service)
    eventually("they serve it", lambda: service.post("kept", "text").status_code == 200)
    assert abs(service.embed("kept", "text") - service.embed("medical", "text")).max() < 1e-5
    shown = service.http.get("/v1/adapters/kept").json()
    assert (shown["pinned"], shown["state"]) == (True, "ready")


def test_all_replicas_are_lost(nodes: Nodes) -> None:
    """Nobody waits long for what is not there, and it serves again as soon as there are nodes."""
    service, started, folder = nodes
    expected = service.embed("medical", "text")
    for node in started:
        if node.process.poll() is None:
            node.kill()
    began_s = time.monotonic()
    while (answer := service.post("medical", "text")).status_code == 200:
        assert time.monotonic() - began_s < ENDS_S
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert time.monotonic() - began_s < ENDS_S
    started[:] = [Node(service.cluster, folder / f"again{number}.log", 2) for number in range(2)]
    eventually("it serves again", lambda: service.post("medical", "text").status_code == 200)
    assert abs(service.embed("medical", "text") - expected).max() < 1e-5


@needs("redis-server")
def test_the_gcs_is_lost_and_comes_back(nodes: Nodes) -> None:
    """Requests go on without it; then Serve goes on with the same processes, and can replace one. Ends the cluster."""
    service, _, folder = nodes

    def known() -> dict[str, int]:
        """The replicas; none while Serve's REST API looks for the GCS."""
        return service.processes("Replica") if service.cluster.applications() else {}

    eventually("both replicas run", lambda: len(known()) == 2, BACK_S)
    before = known()
    gcs = Gcs(service.cluster.state.pid, folder / "gcs.log")
    try:
        judge(load.run_under_load(service, lambda: gcs.kill_and_restart(3), 12))
        eventually("it knows them as they were", lambda: known() == before, BACK_S)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        eventually("it is gone", lambda: len(set(before) & set(known())) == 1, BACK_S)
        eventually("another in its place", lambda: len(known()) == 2, BACK_S)
        service.deploy({"adapters": {"late": str(service.adapters / "medical")}})
        eventually("what was deployed is served", lambda: service.post("late", "text").status_code == 200, BACK_S)
    finally:
        gcs.close()
