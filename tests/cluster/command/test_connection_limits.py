"""How many connections HAProxy accepts, in all and from one address."""

import pytest

from ranklet.cluster.command.front_door import PER_SOURCE_VARIABLE, Limits


@pytest.mark.parametrize(
    ("environment", "open_files", "connections", "per_source"),
    [
        ({}, 1 << 20, 32768, 16384),
        ({}, 20000, 9500, 4750),
        ({}, 1024, 100, 50),
        ({"RAY_SERVE_HAPROXY_MAXCONN": "2000"}, 20000, 2000, 1000),
        ({PER_SOURCE_VARIABLE: "7"}, 20000, 9500, 7),
        ({PER_SOURCE_VARIABLE: "0"}, 20000, 9500, 0),
    ],
)
def test_connections_fit_the_open_files(
    environment: dict[str, str], open_files: int, connections: int, per_source: int
) -> None:
    limits = Limits.of(environment, open_files)
    assert (limits.connections, limits.connections_per_source) == (connections, per_source)
