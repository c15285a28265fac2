"""The program of a client process: `python -m ranklet.cluster.command.bench.worker FD`.

FD is a pipe to the parent process. `client.py` is not the program itself, because its classes would then be pickled as
classes of `__main__`.
"""

import sys
from multiprocessing.connection import Connection

from ranklet.cluster.command.bench.client import run_client

if __name__ == "__main__":
    run_client(Connection(int(sys.argv[1])))
