"""Free TCP ports, so that several clusters live on one machine."""

import contextlib
import random
import socket
from collections.abc import Sequence

_BLOCKS = range(20_000, 32_000)  # above Ray's worker ports, below the kernel's ephemeral ones
_ATTEMPTS = 200


def free_ports(count: int) -> list[int]:
    """Distinct ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def free_block(size: int) -> int:
    """First of `size` consecutive ports that nothing listens on now.

    Raises:
        OSError: none was found.
    """
    for _ in range(_ATTEMPTS):
        first = random.randrange(_BLOCKS.start, _BLOCKS.stop - size)
        if _all_free(range(first, first + size)):
            return first
    raise OSError(f"expected {size} consecutive free ports from {_BLOCKS.start} to {_BLOCKS.stop}, found none")


def _all_free(ports: Sequence[int]) -> bool:
    for port in ports:
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                return False
    return True
