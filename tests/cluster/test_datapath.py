"""A gateway does not start while Ray is open to the network without a token."""

import logging
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import is_loopback, refuse_missing_token
from ranklet.cluster.ingress.gateway import Gateway


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
    ("address", "http_host", "mode", "exposed"),
    [
        ("10.0.0.7", "127.0.0.1", None, "10.0.0.7"),
        ("10.0.0.7", "0.0.0.0", "disabled", "10.0.0.7"),
        ("127.0.0.1", "0.0.0.0", None, "0.0.0.0"),
        ("10.0.0.7", "0.0.0.0", "token", None),
        ("10.0.0.7", "0.0.0.0", "TOKEN", None),
        ("127.0.0.1", "localhost", None, None),
    ],
)
def test_an_open_ray_beyond_loopback_is_refused_unless_told_so(
    address: str, http_host: str, mode: str | None, exposed: str | None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # Serve may stop this logger from propagating
    try:
        if exposed is None:
            refuse_missing_token(http_host, open_ray=False)
        else:
            with pytest.raises(RuntimeError, match=rf"Ray on {exposed} can .*RAY_AUTH_MODE=token.*security\.open_ray"):
                refuse_missing_token(http_host, open_ray=False)
        assert caplog.records == []
        refuse_missing_token(http_host, open_ray=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert bool(caplog.records) == (exposed is not None)
    assert all(record.levelname == "ERROR" for record in caplog.records)


def test_a_gateway_beyond_loopback_does_not_start_without_the_token(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranklet.cluster.ingress.gateway.http_host", lambda: "0.0.0.0")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    args = AppArgs.model_validate({"base": {"model_dir": str(model_dir)}})
    gateway = Gateway.__bases__[0]  # without Serve's wrapper, whose `__del__` is a coroutine
    with pytest.raises(RuntimeError, match=r"on 0\.0\.0\.0 can run code.*security\.open_ray: true"):
        gateway(args, create_autospec(DeploymentHandle))
