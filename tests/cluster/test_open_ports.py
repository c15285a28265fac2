"""Where HTTP listens on loopback, `ranklet up` opens no port to the network that answers without Ray's token."""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from ranklet.cluster.command.ray_head import SEVERAL_NODES_VARIABLE, RayHead
from tests.cluster.nodes import command_line, process_tree
from tests.cluster.service import Service
from tests.ray_internals import call_replica

_LISTENING = "0A"
# gRPC of gateways and replicas refuses callers without the token, before it reads what they send.
_NEED_THE_TOKEN = {"ray::ServeReplica:ranklet:Gateway", "ray::ServeReplica:ranklet:Replica"}


def listeners(pid: int) -> Iterator[str]:
    """Yield the addresses on which a process listens for TCP, as the kernel writes them."""
    sockets = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            sockets.update(re.findall(r"socket:\[(\d+)\]", str(each.readlink())))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in sockets:
                yield fields[1]


def is_loopback(address: str) -> bool:
    host = address.partition(":")[0]
    plain = host.removeprefix("0000000000000000FFFF0000")  # IPv4 on a socket of IPv6
    return host == "00000000000000000000000001000000" or (len(plain) == 8 and plain.endswith("7F"))


def test_ports_beyond_loopback_need_rays_token(service: Service) -> None:
    exposed: dict[str, set[str]] = {}
    total = 0
    for pid in {service.cluster.state.pid, *process_tree(service.cluster.state.pid)}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            found = set(listeners(pid))
            total += len(found)
            if others := {address for address in found if not is_loopback(address)}:
                exposed[command_line(pid).split()[0]] = others
    assert total > 15, "Ray's processes listen on more ports"
    assert exposed.keys() <= _NEED_THE_TOKEN, exposed
    assert all(len(addresses) == 1 for addresses in exposed.values()), exposed


class Proof:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._path,)


def test_processes_unpickle_nothing_that_comes_without_the_token(service: Service, tmp_path: Path) -> None:
    pids = [*service.processes("Gateway").values(), *service.processes("Replica").values()]
    proof = pickle.dumps(Proof(tmp_path / "proof"))
    for pid in pids:
        (port,) = {int(each.rpartition(":")[2], 16) for each in listeners(pid) if not is_loopback(each)}
        for headers in ((), (("authorization", "Bearer wrong"),)):
            assert call_replica(port, proof, *headers) is StatusCode.UNAUTHENTICATED
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0100007F:1F90", True), ("0200007F:1F90", True), ("0000000000000000FFFF00000100007F:1F90", True),
        ("00000000000000000000000001000000:1F90", True), ("00000000:1F90", False), ("0200000A:1F90", False),
        ("00000000000000000000000000000000:1F90", False), ("0000000000000000FFFF00000200000A:1F90", False),
    ],
)  # fmt: skip
def test_addresses_of_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected


def test_a_cluster_that_serves_the_network_is_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus on another machine reads Ray's metrics too."""
    monkeypatch.delenv(SEVERAL_NODES_VARIABLE, raising=False)
    found = [RayHead.with_free_ports(tmp_path, "serve", on_loopback=each).environment({}) for each in (True, False)]
    assert [each.get(SEVERAL_NODES_VARIABLE) for each in found] == ["0", None]
