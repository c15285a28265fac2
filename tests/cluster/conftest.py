"""One real cluster for all tests of this folder, as in deploy/local.yaml: Ray, HAProxy, a gateway, two CPU replicas."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.service import Service, own_configuration, serving
from tests.needs import require


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of the common cluster last: an idle cluster takes a third of a core from tests that start their own."""
    items.sort(key=lambda item: "common_service" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def service(common_service: Service) -> Service:
    return common_service


@pytest.fixture(scope="session")
def common_service(
    runs_ray: None, model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Start the application. Its adapters folder is a copy, so tests may add folders to it."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("cluster")
    with serving(own_configuration(model_dir, adapters_dir, folder), folder) as service:
        yield service
