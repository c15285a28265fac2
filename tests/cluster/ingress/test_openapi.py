"""The API's description is whole, and schemathesis finds nothing that contradicts it."""

import subprocess
import sys
from pathlib import Path

from fastapi.openapi.utils import get_openapi

from ranklet.cluster.ingress.gateway import app
from ranklet.cluster.ingress.openapi import OPERATIONS
from tests.cluster.service import Service, assert_close

_UNDESCRIBED = {("/", "get"), ("/openapi.json", "get")}


def test_every_route_is_described() -> None:
    seen = get_openapi(title="", version="", routes=app.routes)["paths"]
    routes = {(path, method) for path, methods in seen.items() for method in methods}
    assert routes - _UNDESCRIBED == set(OPERATIONS)


def test_no_request_makes_it_contradict_its_description(service: Service, tmp_path: Path) -> None:
    """Thousands of requests made from the description, rightly and wrongly: no 500, no answer of another form."""
    before = service.processes("Gateway"), service.processes("Replica")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{service.url}/openapi.json", "--checks", checks,
        "--max-examples", "25", "--seed", "1", "--request-timeout", "20", "--workers", "2", "--no-color",
        "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert (service.processes("Gateway"), service.processes("Replica")) == before
    for folder in service.adapters.iterdir():  # it may well have found out how to unload them
        if not folder.name.startswith("."):
            loaded = service.http.post("/v1/load_lora_adapter", json={"lora_name": folder.name, "load_inplace": True})
            assert loaded.status_code == 200, loaded.text
    assert_close(service.embed("legal-v2", "still here"), service.expected("legal-v2", ["still here"]))
