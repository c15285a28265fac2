"""A gateway reports that Ray is open to the network without a token."""

import logging

import pytest

from ranklet.cluster.datapath import is_loopback, log_missing_token


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
    ("address", "mode", "errors"),
    [
        ("10.0.0.7", None, 1),
        ("10.0.0.7", "disabled", 1),
        ("10.0.0.7", "token", 0),
        ("10.0.0.7", "TOKEN", 0),
        ("127.0.0.1", None, 0),
    ],
)
def test_an_open_ray_beyond_loopback_is_an_error_in_the_log(
    address: str, mode: str | None, errors: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # Serve may stop this logger from propagating
    try:
        log_missing_token()
    finally:
        logger.removeHandler(caplog.handler)
    assert len(caplog.records) in (errors, 2 * errors)
    assert all(
        "RAY_AUTH_MODE=token" in record.getMessage() and address in record.getMessage() for record in caplog.records
    )
