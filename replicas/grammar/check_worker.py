"""The program that checks grammars: `python -m ranklet.replicas.grammar.check_worker FD TIME_S MEMORY_BYTES`.

FD is the file descriptor of a socket to the gateway, which ends this process if it is late.
"""

import json
import signal
import sys
from multiprocessing.connection import Connection

from llguidance import LLTokenizer

from ranklet.replicas.bounded_process import limit_this_process
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.refusal import refusal_of


def main() -> None:
    descriptor, memory_bytes = int(sys.argv[1]), int(sys.argv[3])
    limit_this_process(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway ends this process
    tokenizer = LLTokenizer("byte")
    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            error = refusal_of(Grammar(request["kind"], request["text"]), tokenizer)
        except (MemoryError, RecursionError) as exceeded:
            error = f"it is too large: {type(exceeded).__name__}"
        connection.send_bytes(json.dumps({"error": error}).encode())


if __name__ == "__main__":
    main()
