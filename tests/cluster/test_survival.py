"""Processes that die and clients that disconnect, over HAProxy."""

import os
import signal
import stat
import time
from pathlib import Path

import httpx
import pytest

from tests.cluster import load
from tests.cluster.nodes import command_line, process_tree
from tests.cluster.service import Service, eventually

BACK_S = 40.0  # 4 to 5 s with idle cores


@pytest.mark.parametrize("victim", [0, 1])
def test_a_replica_killed_under_load_loses_no_request(service: Service, victim: int) -> None:
    before = service.processes("Replica")
    seen = load.kill_replica_under_load(service, victim)
    assert seen["wrong"] == 0
    assert seen["right"] > 20
    assert seen["refused"] < seen["right"]
    load.wait_for_recovery(service)
    assert len(set(service.processes("Replica").values()) - set(before.values())) == 1


def test_a_request_is_answered_although_its_replica_died(service: Service) -> None:
    load.kill_during_request(service)
    load.wait_for_recovery(service)


def test_work_for_a_client_that_disconnected_is_dropped(service: Service) -> None:
    load.disconnect_early(service)
    assert service.embed("legal-v2", "still here").shape == (1, 128)


def test_a_haproxy_that_died_is_back_within_seconds(service: Service) -> None:
    """Until then, clients see what they repeat: a refused connection, or 503 with Retry-After."""
    eventually("there is one HAProxy", lambda: len(_haproxy(service)) == 1)  # one that was replaced may still end
    (haproxy,) = _haproxy(service)
    (folder,) = {path.parent for path in Path(service.cluster.temp_dir).glob("haproxy/*/admin.sock")}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    seen: list[httpx.Response | None] = []
    os.kill(haproxy, signal.SIGKILL)
    killed_s = time.monotonic()
    while not (seen and seen[-1] is not None and seen[-1].status_code == 200):
        assert time.monotonic() - killed_s < BACK_S
        seen.append(_ask(service.url))
        time.sleep(0.02)
    assert seen[0] is None
    refused = [answer for answer in seen[:-1] if answer is not None]
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
        assert answer.headers["retry-after"] == "1"
    assert haproxy not in _haproxy(service)


def _haproxy(service: Service) -> list[int]:
    """Return the process ids of HAProxy. Those that end are not among them."""
    programs = {pid: command_line(pid) for pid in process_tree(service.cluster.state.pid)}
    return [pid for pid, line in programs.items() if " -f " in line and "haproxy.cfg" in line]


def _ask(url: str) -> httpx.Response | None:
    """Ask on a new connection. Returns None if there is no answer."""
    try:
        return httpx.get(f"{url}/health", timeout=30, trust_env=False)
    except httpx.TransportError:
        return None
