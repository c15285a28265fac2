"""The program of a load process: `python -m ranklet.cluster.bench.worker FD`, FD a pipe to the one that started it.

Apart from `client.py`, so that what it sends is not pickled as classes of `__main__`.
"""

import sys
from multiprocessing.connection import Connection

from ranklet.cluster.bench.client import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
