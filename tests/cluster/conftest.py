"""One real cluster for the room, as in deploy/local.yaml: Ray, HAProxy, a gateway, two engine replicas on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.service import Service, own_configuration, serving


@pytest.fixture(scope="session")
def service(model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The application, up. Its adapters' folder is a copy, so tests may drop folders into it."""
    folder = tmp_path_factory.mktemp("cluster")
    with serving(own_configuration(model_dir, adapters_dir, folder), folder) as service:
        yield service
