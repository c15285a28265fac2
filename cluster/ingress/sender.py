"""Names who sends a request. Large bodies of different senders take turns, and have fair shares of the room."""

import ipaddress

from starlette.requests import Request

from ranklet.cluster.access.keys import ApiKey
from ranklet.cluster.datapath import CLIENT_HEADER, DataPath

_NETWORK_BITS = 64  # of IPv6: a client may choose any address in its network


def sender_of(key: ApiKey | None, request: Request) -> str:
    """Return the name of the key; without keys, the client's address as HAProxy or the connection says it."""
    if key is not None:
        return key.name
    said = request.headers.get(CLIENT_HEADER) if DataPath.current().ingress == "haproxy" else None
    return _network(said or (request.client.host if request.client else ""))


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _NETWORK_BITS), strict=False))
