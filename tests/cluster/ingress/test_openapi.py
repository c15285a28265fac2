"""Every route is in the API's description, and no answer contradicts it."""

from pathlib import Path
from unittest.mock import create_autospec

from starlette.routing import Route

from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.openapi import OPERATIONS
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.routes import build_app
from ranklet.cluster.ingress.scoring import SCORING_PATHS
from ranklet.cluster.ingress.tokenize import TokenizeApi
from tests.cluster.described_answers import assert_answers_as_described
from tests.cluster.service import Service, assert_close

INFERENCE = (
    "/v1/embeddings", "/v1/completions", "/v1/chat/completions",
    *(path for paths in SCORING_PATHS.values() for path in paths),
)  # fmt: skip
_UNDESCRIBED = {("/", "get"), ("/openapi.json", "get")}


def test_every_route_is_described() -> None:
    app = build_app(
        inference={path: create_autospec(lambda request: None) for path in INFERENCE},
        tokens=create_autospec(TokenizeApi),
        models=create_autospec(ModelsApi),
        admin=create_autospec(AdminApi),
        probes=create_autospec(ProbesApi),
        drain=Drain(),
    )
    routes = [route for route in app.routes if isinstance(route, Route)]
    described = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert described - _UNDESCRIBED == set(OPERATIONS)


def test_no_answer_contradicts_the_description(service: Service, tmp_path: Path) -> None:
    assert_answers_as_described(service, tmp_path, "--request-timeout", "20", timeout_s=280)
    for folder in service.adapters.iterdir():  # schemathesis may have unloaded some of them
        if not folder.name.startswith("."):
            loaded = service.http.post("/v1/load_lora_adapter", json={"lora_name": folder.name, "load_inplace": True})
            assert loaded.status_code == 200, loaded.text
    assert_close(service.embed("legal-v2", "still here"), service.expected("legal-v2", ["still here"]))
