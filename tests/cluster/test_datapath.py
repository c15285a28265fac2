"""No process of the application starts while Ray is open to the network."""

import logging
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.app import build
from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import is_loopback, refuse_missing_token
from ranklet.cluster.ingress.gateway import Gateway
from ranklet.cluster.replica.deployment import Replica


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("127.example.com", False),
        ("", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("mode", "is_open"), [(None, True), ("disabled", True), ("", True), ("token", False), ("TOKEN", False)]
)
def test_an_open_ray_is_refused_unless_told_so(
    mode: str | None, is_open: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # Serve may stop this logger from propagating
    try:
        if is_open:
            with pytest.raises(RuntimeError, match=r"to 10\.0\.0\.7 can .*RAY_AUTH_MODE=token.*security\.open_ray"):
                refuse_missing_token(open_ray=False)
        else:
            refuse_missing_token(open_ray=False)
        assert caplog.records == []
        refuse_missing_token(open_ray=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert bool(caplog.records) == is_open
    assert all(record.levelname == "ERROR" for record in caplog.records)


def test_nothing_starts_without_the_token(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranklet.cluster.ingress.gateway.http_host", lambda: "127.0.0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    args = AppArgs.model_validate({"base": {"model_dir": str(model_dir)}})
    gateway = Gateway.__bases__[0]  # without Serve's wrapper, whose `__del__` is a coroutine
    starts = (lambda: gateway(args, create_autospec(DeploymentHandle)), lambda: Replica(args), lambda: build(args))
    for start in starts:
        with pytest.raises(RuntimeError, match=r"can run code.*security\.open_ray: true"):
            start()
