"""An S3 server (moto's, over real HTTP) with one bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from moto.server import ThreadedMotoServer

NAME = "models"


@dataclass(frozen=True)
class S3Bucket:
    """Contains adapters in folders below `url`."""

    endpoint: str

    @property
    def url(self) -> str:
        return f"s3://{NAME}/adapters"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of fsspec for this server, in the form of FSSPEC_S3."""
        return {"endpoint_url": self.endpoint, "key": "any", "secret": "any"}

    def put(self, folder: Path, name: str) -> str:
        """Upload an adapter, or replace one; returns its URL."""
        files = fsspec.filesystem("s3", **self.settings, skip_instance_cache=True)
        for path in folder.rglob("*"):
            if path.is_file():
                files.pipe_file(f"{NAME}/adapters/{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{name}"


@contextmanager
def bucket() -> Iterator[S3Bucket]:
    """The server on a free port, with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        made = S3Bucket(f"http://{host}:{port}")
        fsspec.filesystem("s3", **made.settings, skip_instance_cache=True).makedirs(NAME, exist_ok=True)
        yield made
    finally:
        server.stop()
