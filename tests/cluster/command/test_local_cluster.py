"""The local cluster: ports, processes, refusals, and `ranklet up --foreground`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ranklet.cluster.command import cli
from ranklet.cluster.command.cluster_state import find_cluster
from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.ports import free_block, free_ports
from ranklet.cluster.command.processes import child_processes, kill_session, process_start_time, terminate
from ranklet.cluster.command.running_cluster import ClusterError
from ranklet.cluster.command.supervisor_state import find_supervisor
from tests.cluster.nodes import process_tree
from tests.cluster.service import TIMEOUT_S, Service, eventually, local_configuration
from tests.cluster.text_client import events_of

TOKENS = 1000  # of a text that takes some seconds
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def test_ports_are_free_and_distinct() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    first = free_block(16)
    for port in (*ports, *range(first, first + 16)):
        with socket.socket() as sock:
            sock.bind(("", port))


@pytest.mark.parametrize("command", [SLEEP, STUBBORN])
def test_a_process_is_terminated_and_collected(command: list[str]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start_time = process_start_time(process.pid)
        assert start_time is not None
        terminate(process.pid, start_time, timeout_s=0.5)
        assert process_start_time(process.pid) is None


def test_another_process_with_the_same_id_is_left_alone() -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as process:
        terminate(process.pid, "at another time")
        assert process.poll() is None
        process.kill()


def test_a_long_temp_dir_is_refused_before_ray_would_fail(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="up to 21 characters, because Ray creates sockets below it"):
        LocalCluster(tmp_path / ("x" * 40))


def test_a_long_temporary_folder_of_the_system_does_not_stop_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default folder is then in /tmp."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = LocalCluster().temp_dir
    assert folder.parent == Path("/tmp")
    folder.rmdir()
    with pytest.raises(SystemExit):
        cli.main(["up", "--help"])
    assert "(default: /tmp/ranklet-" in " ".join(capsys.readouterr().out.split())


def test_down_without_a_cluster_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["down", "--temp-dir", "/tmp/ranklet-none"]) == 1
    assert "no cluster" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [("- a\n- b\n", "expected a map"), ("a: [", "expected YAML")])
def test_a_configuration_of_another_form_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        assert cli.main(["up", str(config), "--temp-dir", folder]) == 1
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert "ray 2.60" in capsys.readouterr().out


@pytest.mark.usefixtures("runs_ray")
def test_in_the_foreground_a_lost_gcs_is_started_again_and_sigterm_stops_the_cluster(
    model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    """As under systemd and in containers. Adapters that were loaded by name are served again."""
    adapters = tmp_path / "adapters"
    shutil.copytree(adapters_dir / "medical", adapters / ".sources" / "kept")
    with tempfile.TemporaryDirectory(prefix="r-") as name:
        folder = Path(name)
        config = folder / "config.yaml"
        content = _one_replica(model_dir, adapters)
        content["applications"][0]["args"]["engine"]["kv_cache_bytes"] = 16 << 20
        config.write_text(yaml.safe_dump(content))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.bind(f"{folder}/notify")
            notifications.settimeout(TIMEOUT_S)
            environment = {**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"}
            command = _command("up", folder, str(config), "--foreground", "--port", "0")
            with subprocess.Popen(command, env=environment, start_new_session=True) as process:
                assert notifications.recv(1000) == b"READY=1"
                first = find_cluster(folder)
                assert first is not None
                with httpx.Client(base_url=first.base_url, trust_env=False, timeout=TIMEOUT_S) as http:
                    kept = {"lora_name": "kept", "lora_path": ".sources/kept"}
                    assert http.post("/v1/load_lora_adapter", json=kept).status_code == 200
                    assert _asks(http, "kept") == 200
                    _lose_gcs(folder, first.pid, lambda: _asks(http, "kept") == 200)
                    second = find_cluster(folder)
                    assert second is not None
                    assert (second.base_url, second.pid == first.pid) == (first.base_url, False)
                    _end_in_flight(http, process)
                assert process.wait(TIMEOUT_S) == 0
            said = [notifications.recv(1000).decode() for _ in range(4)]
            seen = said[0].removeprefix("STATUS=").removesuffix(" ended unexpectedly")
            assert seen in ("Ray's GCS", "Ray"), "Ray ends a second after its GCS"
            assert said[-1] == "STOPPING=1"
        assert process_start_time(second.pid) is None
        assert (find_cluster(folder), find_supervisor(folder)) == (None, None)


def _one_replica(model_dir: Path, adapters: Path) -> dict[str, Any]:
    """Return a configuration that starts sooner than with two replicas."""
    content = local_configuration(model_dir, adapters)
    content["applications"][0]["deployments"][1]["num_replicas"] = 1
    return content


def _command(name: str, folder: Path, *others: str) -> list[str]:
    return [sys.executable, "-m", "ranklet.cluster.command.cli", name, "--temp-dir", str(folder), *others]


def _asks(http: httpx.Client, model: str) -> int | None:
    """Ask for an embedding, and return the status of the answer; None if there is no answer."""
    try:
        return http.post("/v1/embeddings", json={"model": model, "input": "text"}).status_code
    except httpx.TransportError:
        return None


def _lose_gcs(folder: Path, ray: int, is_back: Callable[[], bool]) -> None:
    """Kill the GCS. Without supervision, the service would stay down for good."""
    (gcs,) = (pid for pid, line in child_processes(ray).items() if line.partition(" ")[0].endswith("/gcs_server"))
    os.kill(gcs, signal.SIGKILL)
    killed_s = time.monotonic()
    eventually("the head has ended", lambda: process_start_time(ray) is None)
    eventually("requests are answered again", is_back)
    taken_s = time.monotonic() - killed_s
    sys.stdout.write(f"answered again {taken_s:.1f} s after the GCS was killed\n")
    eventually("the start is complete", lambda: (now := find_supervisor(folder)) is not None and now.restarts == 1)


@pytest.mark.usefixtures("runs_ray")
def test_down_ends_the_supervisor_also_while_it_starts_ray(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(_one_replica(model_dir, adapters_dir)))
    with tempfile.TemporaryDirectory(prefix="r-") as name:
        folder, place = Path(name), ["--temp-dir", name]
        subprocess.run(_command("up", folder, str(config), "--port", "0"), check=True)
        state, supervisor = find_cluster(folder), find_supervisor(folder)
        assert state is not None
        assert supervisor is not None
        assert cli.main(["status", *place]) == 0
        assert f"supervisor, process {supervisor.pid}, has started Ray again 0 times" in capsys.readouterr().out
        os.kill(state.pid, signal.SIGKILL)
        eventually("Ray is being started", lambda: (now := find_cluster(folder)) is not None and now.pid != state.pid)
        starting = find_cluster(folder)
        assert starting is not None
        assert cli.main(["status", *place]) == 1
        assert "attempt 1 of 10 to start Ray again" in capsys.readouterr().out
        with pytest.raises(ClusterError, match="already"):
            LocalCluster(folder).start(config)
        assert cli.main(["down", *place]) == 0
        left = [each for each in (supervisor.pid, *process_tree(starting.pid)) if process_start_time(each) is not None]
        assert left == []
        assert (find_cluster(folder), find_supervisor(folder)) == (None, None)


def test_the_rest_of_a_session_is_killed() -> None:
    """Ray's processes stay in the session of `ray start`, also when that one has ended."""
    code = f"import subprocess; print(subprocess.Popen({SLEEP!r}, process_group=0).pid, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout is not None
        left = int(leader.stdout.readline())
        leader.wait()
        assert process_start_time(left) is not None
        kill_session(leader.pid)
        assert process_start_time(left) is None


def _end_in_flight(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM when half of a request has arrived and texts are streamed. They are answered all the same.

    A second SIGTERM ends the longest text with an error.
    """
    go_on = threading.Event()
    text = {"model": "kept", "prompt": [5, 6], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    text["stream_options"] = {"include_usage": True}
    endless = {**text, "max_tokens": 4000}

    def body() -> Iterator[bytes]:
        content = json.dumps({"model": "kept", "input": "text"}).encode()
        yield content[:10]
        go_on.wait()
        yield content[10:]

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(http.post, "/v1/embeddings", content=body())
        try:
            eventually("it is in flight", lambda: http.get("/v1/status").json()["in_flight"] == 1)
            stream = pool.submit(http.post, "/v1/completions", json=text)
            cut_off = pool.submit(http.post, "/v1/completions", json=endless)
            eventually("all are", lambda: http.get("/v1/status").json()["in_flight"] == 3, poll_s=0.05)
            process.send_signal(signal.SIGTERM)
            eventually("probes see the stop", lambda: http.get("/ready").status_code == 503, poll_s=0.05)
            assert http.get("/ready").json()["in_flight"] == 3
            assert http.post("/v1/embeddings", json={"input": "text"}).status_code == 503
            assert http.post("/v1/completions", json=text).status_code == 503
        finally:
            go_on.set()
        assert answer.result().status_code == 200
        *_, usage, end = filter(None, stream.result().text.split("\n"))
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == TOKENS
        assert end == "data: [DONE]"
        process.send_signal(signal.SIGTERM)
        assert events_of(cut_off.result().content)[-1]["error"]["code"] == "unavailable"


def test_a_second_start_in_the_same_folder_is_refused(service: Service, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="already"), LocalCluster(service.cluster.temp_dir) as second:
        second.start(tmp_path / "any.yaml")
    assert find_cluster(service.cluster.temp_dir) == service.cluster.state, "the first cluster was stopped"
    assert service.http.get("/ready").status_code == 200


def test_gateways_and_routers_import_without_torch() -> None:
    imported = "ranklet.cluster.ingress.gateway, ranklet.cluster.app, ranklet.routing.router"
    code = f"import sys, {imported}; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
