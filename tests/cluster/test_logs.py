"""Messages that refer to the log say where it is."""

import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranklet.cluster.ingress.refusals import unexpected
from ranklet.cluster.logs import log_place


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Serve's log of this process, behind a buffer as in Serve."""
    path, logger = tmp_path / "gateway.log", logging.getLogger("ray.serve")
    file = logging.FileHandler(path)
    buffer = logging.handlers.MemoryHandler(10, target=file, flushLevel=logging.ERROR)
    logger.addHandler(buffer)
    yield path
    logger.removeHandler(buffer)
    buffer.close()
    file.close()


def test_a_defect_is_answered_with_the_log_that_has_its_traceback(log: Path) -> None:
    error = unexpected("GET /x (id-7) failed", RuntimeError("the cause"), "x-request-id id-7")
    assert f"x-request-id id-7 in {log} on " in error.message
    assert "the cause" not in error.message
    assert "GET /x (id-7) failed" in log.read_text()
    assert "the cause" in log.read_text()


def test_without_a_file_it_is_serves_log() -> None:
    assert log_place() == "Serve's log"
