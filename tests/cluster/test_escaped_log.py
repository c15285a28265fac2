"""Serve's log has nothing that a terminal would obey, whatever clients send as the id of a request."""

import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranklet.cluster.logs import escape_log

SENT, SHOWN = "\x9b2J\u202eid", r"\x9b2J\u202eid"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Serve's logger, with no handlers but those of a test."""
    logger = logging.getLogger("ray.serve")
    handlers, logger.handlers = logger.handlers, []
    yield logger
    logger.handlers = handlers


def test_messages_fields_and_tracebacks_are_escaped(logger: logging.Logger, tmp_path: Path) -> None:
    file = logging.FileHandler(tmp_path / "log")  # Serve logs to a file through a buffer
    file.setFormatter(logging.Formatter("%(levelname)s %(request_id)s %(message)s"))
    logger.addHandler(logging.handlers.MemoryHandler(100, target=file))
    for _ in range(3):  # it is called again and again
        escape_log()
    try:
        raise ValueError(SENT)
    except ValueError:
        logger.exception("first %s", SENT, extra={"request_id": SENT})
    file.close()
    text = (tmp_path / "log").read_text()
    assert text.startswith(f"ERROR {SHOWN} first {SHOWN}\nTraceback")
    assert text.endswith(f"ValueError: {SHOWN}\n")
    assert SENT not in text


def test_new_handlers_escape_too(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    escape_log()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    escape_log()
    logger.error("a %s", SENT)
    assert capsys.readouterr().err == f"a {SHOWN}\n"
