"""An S3 server (moto's, over real HTTP) with one bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def files(self) -> Any:
        """A client of its own, which takes a third of a second to make."""
        return fsspec.filesystem("s3", **self.settings, skip_instance_cache=True)

    def put(self, folder: Path, name: str) -> str:
        """Upload an adapter, or replace one; returns its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files.pipe_file(f"{NAME}/adapters/{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{name}"


@contextmanager
def bucket() -> Iterator[S3Bucket]:
    """The server on a free port, with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        made = S3Bucket(f"http://{host}:{port}")
        made.files.makedirs(NAME, exist_ok=True)
        yield made
    finally:
        server.stop()
