"""The program of a load process: `python -m ranklet.cluster.command.bench.worker FD`.

FD is a pipe to the process that started it.

Apart from `client.py`, so that what it sends is not pickled as classes of `__main__`.
"""

import sys
from multiprocessing.connection import Connection

from ranklet.cluster.command.bench.client import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
