"""A headless Chromium that tests drive through its DevTools protocol."""

import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1200,760",
)  # fmt: skip
_START_S = _WAIT_S = 60.0


class Page:
    """A page of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._calls = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        self._connection.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline_s = time.monotonic() + _WAIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline_s, f"not true within {_WAIT_S:g} s: {condition}"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(url: str, folder: Path) -> Iterator[Page]:
    """Open a page in a new browser, whose profile is in `folder`, and wait until it is loaded."""
    profile = folder / "profile"
    process = subprocess.Popen(
        ["chromium", *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with connect(_page_address(profile, process), max_size=None, proxy=None) as connection:
            page = Page(connection)
            page.call("Page.navigate", url=url)
            page.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")
            yield page
    finally:
        process.terminate()
        process.wait()


def _page_address(profile: Path, process: "subprocess.Popen[bytes]") -> str:
    """Return the WebSocket of the browser's page, once it has one."""
    port_file, deadline_s = profile / "DevToolsActivePort", time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the browser has ended"
        if port_file.exists() and (lines := port_file.read_text().splitlines()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json", timeout=10) as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            if pages:
                address: str = pages[0]["webSocketDebuggerUrl"]
                return address
        time.sleep(0.05)
    raise AssertionError(f"the browser has no page after {_START_S:g} s")
