"""Waits until the requests in flight have ended, before a cluster stops. Its gateways refuse new requests."""

import contextlib
import json
import time
import urllib.error
from collections.abc import Callable

from ranklet.cluster.command.json_client import fetch_json

_POLL_S = 0.2
_HTTP_TIMEOUT_S = 10.0
_SILENT_S = 3.0  # without an answer for so long, nobody is left to wait for
_FLUSH_S = 0.5  # for HAProxy to pass on the last bytes


def wait_for_requests(
    base_url: str, timeout_s: float, report: Callable[[str], None], is_running: Callable[[], bool]
) -> bool:
    """Return when no gateway works on a request, or after `timeout_s`.

    Args:
        is_running: whether the cluster still exists.

    Returns:
        False if requests are left after `timeout_s`.
    """
    begin_s = answered_s = time.monotonic()
    reported = False
    while is_running():
        in_flight, now_s = _requests_in_flight(base_url), time.monotonic()
        if in_flight == 0:
            time.sleep(_FLUSH_S)
            return True
        if in_flight is not None:
            answered_s = now_s
        elif now_s - answered_s > _SILENT_S:
            return True
        if now_s - begin_s > timeout_s:
            if in_flight:
                report(f"{in_flight} requests did not end within {timeout_s:g} s (graceful_shutdown_timeout_s)")
            return False
        if in_flight and not reported:
            report(f"waiting up to {timeout_s:g} s for {in_flight} requests in flight; a signal ends them at once")
            reported = True
        time.sleep(_POLL_S)
    return True


def _requests_in_flight(base_url: str) -> int | None:
    """Return the requests in all gateways; None if none says that it lets them end."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        try:
            fetch_json(f"{base_url}/ready", timeout_s=_HTTP_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                return int(json.load(error)["in_flight"])
    return None
