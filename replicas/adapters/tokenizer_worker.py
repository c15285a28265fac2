"""The program that compares tokenizers which are the base model's but for added tokens.

Usage: `python -m ranklet.replicas.adapters.tokenizer_worker FD TIME_S MEMORY_BYTES`. FD is the file descriptor of a
socket to the replica or the engine, which ends this process if it is late.
"""

import json
import signal
import sys
from dataclasses import asdict
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer
from ranklet.replicas.bounded_process import limit_this_process

_base = lru_cache(1)(BaseTokenizer)


def main() -> None:
    descriptor, memory_bytes = int(sys.argv[1]), int(sys.argv[3])
    limit_this_process(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        found = _base(Path(question["base"])).compare_similar(Path(question["adapter"]))
        connection.send_bytes(json.dumps({"compared": None if found is None else asdict(found)}).encode())


if __name__ == "__main__":
    main()
