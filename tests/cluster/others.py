"""What others notice while a test attacks the service: their waits, and the memory of the gateways."""

import threading
import time
from pathlib import Path

import httpx

from tests.cluster.service import BASE, TIMEOUT_S, Service


def memory(service: Service) -> int:
    """Return the resident bytes of all gateways."""
    pages = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in service.processes("Gateway").values())
    return sum(map(int, pages)) * 4096


class Others:
    """A client that sends small requests, and watches the gateways' memory, while the context lasts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.waits_s: list[float] = []
        self.statuses: set[int] = set()
        self.peak = 0

    def __enter__(self) -> "Others":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        pids = self._service.processes("Gateway").values()
        with httpx.Client(base_url=self._service.url, timeout=TIMEOUT_S, trust_env=False) as http:
            while not self._end.wait(0.02):
                began_s = time.monotonic()
                self.statuses.add(http.post("/v1/embeddings", json={"model": BASE, "input": "others"}).status_code)
                self.waits_s.append(time.monotonic() - began_s)
                pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
                self.peak = max(self.peak, sum(pages) * 4096)
