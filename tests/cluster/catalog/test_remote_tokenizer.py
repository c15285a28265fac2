"""The files beside an adapter's weights come with a remote adapter and are part of its revision."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import RankletError
from tests.cluster.catalog.bucket import S3Bucket
from tests.http_server import http_server


@pytest.mark.parametrize("names", [(), ("tokenizer.json",), ("modules.json", "1_Pooling/config.json")])
def test_a_remote_adapter_has_the_revision_of_its_folder(
    names: tuple[str, ...], s3: S3Bucket, adapters_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters_dir / "legal-v2", tmp_path / "folder"))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    found = RemoteCache(tmp_path / "cache", 1 << 30, 1 << 30).fetch(s3.put(folder, f"with-{len(names)}"))
    assert found.revision == revision_of(folder)
    assert all((found.folder / name).is_file() for name in names)


class RefusingHandler(SimpleHTTPRequestHandler):
    """Answers requests for tokenizer files with a status."""

    def __init__(self, status: int, *args: Any, **options: Any) -> None:
        self._status = status
        super().__init__(*args, **options)

    def send_head(self) -> Any:
        if "tokenizer" not in self.path:
            return super().send_head()
        self.send_error(self._status)
        return None


@contextmanager
def served(folder: Path, status: int) -> Iterator[str]:
    with http_server(partial(RefusingHandler, status, directory=str(folder))) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("status", [403, 404])
def test_an_adapter_without_tokenizer_files_is_fetched_over_http(
    status: int, adapters_dir: Path, tmp_path: Path
) -> None:
    with served(adapters_dir, status) as url:
        found = RemoteCache(tmp_path / "cache", 1 << 30, 1 << 30).fetch(f"{url}/medical")
    assert found.revision == revision_of(adapters_dir / "medical")


def test_a_server_that_fails_has_not_said_that_there_is_no_tokenizer(adapters_dir: Path, tmp_path: Path) -> None:
    with served(adapters_dir, 503) as url, pytest.raises(RankletError, match="tokenizer_config"):
        RemoteCache(tmp_path / "cache", 1 << 30, 1 << 30).fetch(f"{url}/medical")
