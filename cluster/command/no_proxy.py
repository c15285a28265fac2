"""Keeps the traffic inside a cluster away from the proxies that the environment names."""

import contextlib
import os
import socket
from collections.abc import Mapping

_VARIABLES = ("NO_PROXY", "no_proxy")  # Python's libraries read both, gRPC only the second


def no_proxy_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that exclude this machine from proxies, in addition to the hosts that they exclude now."""
    environment = os.environ if environment is None else environment
    given = [host.strip() for name in _VARIABLES for host in environment.get(name, "").split(",")]
    hosts = dict.fromkeys([*filter(None, given), "127.0.0.1", "localhost", "::1", *_own_addresses()])
    return dict.fromkeys(_VARIABLES, ",".join(hosts))


def _own_addresses() -> list[str]:
    """Return the address that Ray gives this node: that of the interface with the default route. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("8.8.8.8", 53))
        return [str(sock.getsockname()[0])]
    return []
