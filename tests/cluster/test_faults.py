"""Processes and nodes of a cluster of three die, hang and change under load: every request and stream ends right."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.assets.hanging import hanging
from tests.cluster import load
from tests.cluster.gcs import Gcs, redis_server
from tests.cluster.load import LoadResult
from tests.cluster.nodes import Node, actor_process, engine_process, kill_tree, process_tree, serving_on_nodes
from tests.cluster.service import BASE, Service, eventually, own_configuration, summed_samples, vectors_of
from tests.cluster.stream_load import StreamLoad, stream_requests
from tests.needs import is_installed, needs, require

Nodes = tuple[Service, list[Node], Path]
ENDS_S = 40.0  # longest time of a request after a fault: at most 10 s with idle cores (`tests.bench.stream_faults`)
LOST_STREAMS = 18


@pytest.fixture(scope="module")
def gcs_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a GCS that stores its state in Redis if one is installed, else in its own memory."""
    if not is_installed("redis-server"):
        yield {}
        return
    with redis_server(tmp_path_factory.mktemp("redis")) as environment:
        yield environment


@pytest.fixture(scope="module")
def nodes(
    runs_ray: None, model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory,
    gcs_storage: dict[str, str],
) -> Iterator[Nodes]:  # fmt: skip
    """The gateways are on the head."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("nodes")
    content = own_configuration(model_dir, adapters_dir, folder)
    gateway, replica = content["applications"][0]["deployments"]
    gateway["num_replicas"] = 2
    gateway["ray_actor_options"] = {"num_cpus": 0.1, "resources": {"node:__internal_head__": 0.001}}
    replica["ray_actor_options"] = {"num_cpus": 0.5, "resources": {"engine": 1}}
    replica["graceful_shutdown_timeout_s"] = 1  # so that texts outlast it
    content["applications"][0]["args"]["engine"] |= {"load_timeout_s": 3.0, "kv_cache_bytes": 64 << 20}
    with serving_on_nodes(content, folder, gcs_storage) as (service, started):
        load.wait_for_two(service)
        yield service, started, folder


@pytest.fixture(scope="module")
def streams(nodes: Nodes) -> StreamLoad:
    return StreamLoad(nodes[0].url, stream_requests((BASE, "legal-v2", "medical"), 8, 64))


@pytest.fixture(scope="module")
def long_streams(nodes: Nodes) -> StreamLoad:
    """One text a stream, which takes longer than a replica has to end it."""
    long = [fields | {"max_tokens": 400} for fields in stream_requests((BASE,), 4, 400) if "n" not in fields]
    return StreamLoad(nodes[0].url, long)


def run_beside_streams(service: Service, streams: StreamLoad, fault: Callable[[], object], count: int = 64) -> None:
    """Request embeddings and keep streams open. All must end right, with no long pause."""
    streams.clear()
    with streams.running(count):
        judge(load.run_under_load(service, fault))
    assert set(streams.verdicts) == {"right"}, (streams.verdicts, streams.errors)
    assert streams.ended >= count
    assert streams.pause_s < ENDS_S


def judge(seen: LoadResult) -> None:
    assert seen["wrong"] == 0
    assert seen["right"] > 20
    assert seen.slowest_s < ENDS_S


@pytest.mark.parametrize("hung", ["engine", "actor"])
def test_a_replica_that_hangs_is_avoided_and_replaced(nodes: Nodes, streams: StreamLoad, hung: str) -> None:
    """After SIGSTOP it accepts requests and never answers."""
    service, _, _ = nodes
    actor = next(iter(service.processes("Replica").values()))
    stopped = engine_process(actor) if hung == "engine" else actor
    try:
        run_beside_streams(service, streams, lambda: os.kill(stopped, signal.SIGSTOP))
        eventually("another replica in its place", lambda: actor not in service.processes("Replica").values())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    load.wait_for_two(service)


def test_streams_on_two_replicas_of_a_lost_node_go_on_elsewhere(nodes: Nodes, long_streams: StreamLoad) -> None:
    """Those on the other node stay where they are. The lost replicas start there too."""
    service, started, folder = nodes
    scale(service, 3)
    eventually("all three answer", lambda: len(prompts_by_replica(service)) == 3)
    replicas = service.processes("Replica")
    number, lost = next(
        (number, ids)
        for number, node in enumerate(started)
        if len(ids := {id for id, pid in replicas.items() if pid in set(process_tree(node.process.pid))}) == 2
    )
    (kept,) = replicas.keys() - lost
    streams = long_streams
    streams.clear()
    before, continued = prompts_by_replica(service)[kept], continuations(service)

    def computed() -> float:
        return sum(prompts for id, prompts in prompts_by_replica(service).items() if id not in lost) - before

    with contextlib.ExitStack() as ended:

        def lose_node() -> None:
            ended.enter_context(streams.running(LOST_STREAMS, most=LOST_STREAMS))
            eventually("all streams have begun", lambda: streams.opened.total() == LOST_STREAMS, poll_s=0.02)
            started[number].kill()

        judge(load.run_under_load(service, lose_node, models=load.MODELS[1:]))
    assert streams.verdicts == {"right": LOST_STREAMS}, (streams.verdicts, streams.errors)
    assert streams.pause_s < ENDS_S
    moved = sum(streams.opened[id] for id in lost)
    assert 0 < moved < LOST_STREAMS, streams.opened
    assert continuations(service) - continued >= moved
    # The prompt of each stream once: no stream that began on the other node was sent a second time.
    eventually("all prompts are counted", lambda: computed() >= LOST_STREAMS)
    assert computed() == LOST_STREAMS
    eventually("two replicas answer", lambda: len(prompts_by_replica(service)) == 2)
    scale(service, 2)
    started[number] = Node(service.cluster, folder / "node2.log", 2)


def scale(service: Service, count: int) -> None:
    service.scale("Replica", count)
    eventually(f"{count} replicas", lambda: len(service.processes("Replica")) == count)


def continuations(service: Service) -> float:
    return service.samples("gateway").get("ranklet_continuations_total", 0.0)


def prompts_by_replica(service: Service) -> dict[str, float]:
    """Return how many prompts of the base model each replica has computed, by its id."""
    return {
        group["labels"]["replica"]: summed_samples(group["targets"], {"adapter": "base"}).get(
            "ranklet_prompts_total", 0.0
        )
        for group in service.targets()
        if group["labels"]["role"] == "replica"
    }


def test_streams_of_a_replica_that_is_removed_go_on(nodes: Nodes, long_streams: StreamLoad) -> None:
    service, _, _ = nodes
    before = continuations(service)
    try:
        run_beside_streams(service, long_streams, lambda: scale(service, 1))
        assert continuations(service) > before
    finally:
        scale(service, 2)
        load.wait_for_two(service)


def test_requests_are_answered_while_the_controller_is_replaced(nodes: Nodes, streams: StreamLoad) -> None:
    """The new controller finds the same replicas."""
    service, _, _ = nodes
    before = service.processes("Replica")
    run_beside_streams(service, streams, lambda: os.kill(actor_process(service, "ServeController"), signal.SIGKILL))
    eventually("the controller answers again", lambda: service.processes("Replica") == before)


def test_a_disk_that_hangs_delays_only_the_adapters_on_it(nodes: Nodes) -> None:
    service, _, _ = nodes
    stuck = service.adapters / "stuck"
    shutil.copytree(service.adapters / "legal-v2", stuck)
    with hanging(stuck / "adapter_model.safetensors"), ThreadPoolExecutor(4) as pool:
        began_s = time.monotonic()
        asked = [pool.submit(service.post, "stuck", "text") for _ in range(4)]
        judge(load.run_under_load(service, lambda: wait(asked)))
        for one in asked:
            answer = one.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_loading"), answer.text
        assert time.monotonic() - began_s < ENDS_S
    assert (service.embed("stuck", "text") == service.embed("legal-v2", "text")).all()
    shutil.rmtree(stuck)


def test_an_adapter_that_is_deleted_while_it_loads_affects_only_its_own_requests(nodes: Nodes) -> None:
    """They get the right vector or an error."""
    service, _, _ = nodes
    expected = service.embed("medical", "text")
    for turn in range(6):
        doomed = service.adapters / f"doomed{turn}"
        shutil.copytree(service.adapters / "medical", doomed)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(service.post, doomed.name, "text", encoding_format="base64") for _ in range(3)]
            time.sleep(0.004 * turn)  # each turn deletes the folder at another stage of the load
            shutil.rmtree(doomed)
            for one in asked:
                answer = one.result(timeout=ENDS_S)
                if answer.status_code == 200:
                    assert abs(vectors_of(answer)[0] - expected[0]).max() < 1e-5
                else:
                    assert answer.status_code in (400, 404), answer.text
    assert abs(service.embed("medical", "text") - expected).max() < 1e-5


def test_a_new_configuration_replaces_every_process_without_failed_requests(nodes: Nodes, streams: StreamLoad) -> None:
    """The new processes serve the adapters that were loaded by name, although the new `user_config` is faulty.

    In its place, they use the last good one of the processes that they replace, although the process that kept it died.
    """
    service, _, _ = nodes
    shutil.copytree(service.adapters / "medical", service.adapters / ".sources" / "kept")
    kept = {"lora_name": "kept", "lora_path": ".sources/kept", "pinned": True}
    assert service.http.post("/v1/load_lora_adapter", json=kept).status_code == 200
    before = set(service.processes("Replica").values())
    service.deploy({"adapters": {"earlier": str(service.adapters / "medical")}})
    eventually("the gateways serve it", lambda: service.post("earlier", "text").status_code == 200)
    os.kill(actor_process(service, "KeptContents"), signal.SIGKILL)
    arguments = service.content["applications"][0]["args"]
    arguments["engine"]["slots"] = 6
    faulty = {"tokens_per_minute": {"earlier": 0}}

    def replace_all() -> None:
        service.deploy(faulty, of_replicas={"adaptors": {}})
        eventually("all replicas are new", lambda: not before & set(service.processes("Replica").values()))

    run_beside_streams(service, streams, replace_all, count=16)
    load.wait_for_two(service)
    eventually("the new replicas serve the adapter", lambda: service.post("kept", "text").status_code == 200)
    assert abs(service.embed("kept", "text") - service.embed("medical", "text")).max() < 1e-5
    shown = service.http.get("/v1/adapters/kept").json()
    assert (shown["pinned"], shown["state"]) == (True, "ready")
    assert abs(service.embed("earlier", "text") - service.embed("medical", "text")).max() < 1e-5

    def refusing() -> dict[str, int]:
        listed = service.http.get("/v1/status").json()["refused_settings"]
        return {each["role"]: len(each["processes"]) for each in listed}

    eventually("all new processes refuse the content", lambda: refusing() == {"gateway": 2, "replica": 2})
    service.deploy(None)
    eventually("all is well", lambda: refusing() == {})


def test_requests_are_refused_soon_while_there_is_no_node(nodes: Nodes) -> None:
    """They are answered again as soon as there are nodes."""
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
    eventually("requests are answered again", lambda: service.post("medical", "text").status_code == 200)
    assert abs(service.embed("medical", "text") - expected).max() < 1e-5


@needs("redis-server")
def test_requests_are_answered_without_the_gcs(nodes: Nodes, streams: StreamLoad) -> None:
    """After its restart Serve has the same replicas and can replace one. Ends the cluster."""
    service, _, folder = nodes

    def replicas() -> dict[str, int]:
        """The replicas; empty while Serve's REST API waits for the GCS."""
        return service.processes("Replica") if service.cluster.applications() else {}

    eventually("both replicas run", lambda: len(replicas()) == 2)
    before = replicas()
    gcs = Gcs(service.cluster.state.pid, folder / "gcs.log")
    try:
        run_beside_streams(service, streams, lambda: gcs.kill_and_restart(3))
        eventually("Serve has the same replicas", lambda: replicas() == before)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        eventually("the killed replica is gone", lambda: len(set(before) & set(replicas())) == 1)
        eventually("another replica in its place", lambda: len(replicas()) == 2)
        service.deploy({"adapters": {"late": str(service.adapters / "medical")}})
        eventually("the deployed adapter is served", lambda: service.post("late", "text").status_code == 200)
    finally:
        gcs.close()
        kill_tree(service.cluster.state.pid)  # it does not end by SIGTERM with a GCS that it has not started
