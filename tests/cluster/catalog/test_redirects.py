"""A redirect of a remote source is checked like the first address."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.remote_folder import RemoteFolder
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import InvalidRequest
from tests.http_server import http_server


class Redirecting(SimpleHTTPRequestHandler):
    """Serves /inside, redirects /moved to it, and /out to an address that is not allowed."""

    asked: ClassVar[list[str]] = []

    def send_head(self) -> Any:
        self.asked.append(self.path)
        _, first, rest = self.path.split("/", 2)
        if first == "inside":
            self.path = f"/{rest}"
            return super().send_head()
        self.send_response(302)
        self.send_header("Location", f"/{'inside' if first == 'moved' else 'private'}/{rest}")
        self.end_headers()
        return None


@pytest.fixture
def url(adapters_dir: Path) -> Iterator[str]:
    Redirecting.asked = []
    with http_server(partial(Redirecting, directory=str(adapters_dir))) as port:
        yield f"http://127.0.0.1:{port}"


def cache(folder: Path, url: str) -> RemoteCache:
    allowed = tuple(f"{url}/{each}" for each in ("inside", "moved", "out"))
    return RemoteCache(folder, 1 << 30, 1 << 30, open_folder=partial(RemoteFolder, allowed=allowed))


def test_redirects_within_what_is_allowed_are_followed(url: str, adapters_dir: Path, tmp_path: Path) -> None:
    assert cache(tmp_path, url).fetch(f"{url}/moved/medical").revision == revision_of(adapters_dir / "medical")


def test_other_redirects_are_refused_and_never_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"sources\.allowed"):
        cache(tmp_path, url).fetch(f"{url}/out/medical")
    assert Redirecting.asked
    assert not any(path.startswith("/private") for path in Redirecting.asked)
