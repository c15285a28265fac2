"""What HAProxy says of its servers, over its own socket."""

import csv
import io
import socket
from pathlib import Path

_TIMEOUT_S = 5.0


def servers_up(temp_dir: Path) -> int:
    """Return how many servers take requests, without those that only take over when no other is up.

    Args:
        temp_dir: temporary folder of the Ray cluster.
    """
    (path,) = temp_dir.glob("haproxy/*/admin.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"show stat\n")
        with connection.makefile(encoding="utf-8") as answer:
            rows = list(csv.DictReader(io.StringIO(answer.read().lstrip("# "))))
    return sum(row["type"] == "2" and row["bck"] == "0" and row["status"].startswith("UP") for row in rows)
