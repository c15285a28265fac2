"""One cluster for all tests of this folder: an engine on the CPU that generates text, behind HAProxy."""

from collections.abc import Iterator

import pytest

from tests.cluster.chat_models import make_chat_models
from tests.cluster.service import Service, local_configuration, serving
from tests.needs import require


@pytest.fixture(scope="package")
def service(runs_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start the application. Tests may write to its adapters folder."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("texts")
    make_chat_models(folder)
    content = local_configuration(folder / "model", folder / "adapters")
    application = content["applications"][0]
    application["deployments"][1] |= {"num_replicas": 1, "graceful_shutdown_timeout_s": 120}
    application["args"]["limits"] = {"max_waiting_stream_bytes": 1 << 16}
    with serving(content, folder) as service:
        yield service
