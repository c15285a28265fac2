"""Free TCP ports, so that several clusters can share one machine."""

import contextlib
import random
import socket
from collections.abc import Sequence

_BLOCKS = range(20_000, 32_000)  # above the ports of Ray's workers, below the kernel's ephemeral ports
_ATTEMPTS = 200


def free_ports(count: int) -> list[int]:
    """Return distinct ports on which no process listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def free_block(size: int) -> int:
    """Return the first of `size` consecutive ports on which no process listens now.

    Raises:
        OSError: there is no such block.
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
