"""Requests that schemathesis makes from the API's description, valid and invalid."""

import subprocess
import sys
from pathlib import Path

from tests.cluster.service import Service

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def assert_answers_as_described(service: Service, folder: Path, *options: str, timeout_s: float) -> None:
    """Send thousands of requests. None may end a process, get a 500 or an answer of another form than described.

    Schemathesis writes into `folder` and has one thread: with two, Python 3.11 at times fails to parse source code
    (https://github.com/python/cpython/issues/106905).
    """
    before = service.processes("Gateway"), service.processes("Replica")
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{service.url}/openapi.json", "--checks", CHECKS,
        "--max-examples", "25", "--seed", "1", "--workers", "1", "--no-color", "--generation-database", "none",
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert (service.processes("Gateway"), service.processes("Replica")) == before
