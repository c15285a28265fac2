"""Remote adapters are downloaded from a real S3 server and over HTTP: once, completely, within the size limits."""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.catalog.remote import FetchedAdapter, RemoteCache
from ranklet.cluster.catalog.remote_folder import RemoteFolder
from ranklet.cluster.catalog.resolver import AdapterResolver
from ranklet.cluster.catalog.source import check_url_allowed, missing_folder
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, StillLoading, Unavailable
from tests.cluster.catalog.bucket import S3Bucket
from tests.http_server import http_server


class Cache(RemoteCache):
    """A cache that counts its downloads."""

    def __init__(self, root: Path, max_bytes: int = 1 << 30, max_adapter_bytes: int = 1 << 30, **options: Any) -> None:
        self.downloads: list[str] = []
        super().__init__(
            root, max_bytes, max_adapter_bytes, lambda url, seconds, size: self.downloads.append(url), **options
        )


def same(folder: Path, original: Path) -> bool:
    return all((folder / name).read_bytes() == (original / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))


def test_an_adapter_is_downloaded_once_per_node(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url, cache = s3.put(adapters_dir / "legal-v2", "once"), Cache(tmp_path / "cache")
    first = cache.fetch(url)
    assert same(first.folder, adapters_dir / "legal-v2")
    assert first.downloaded
    again = cache.fetch(f"{url}#{first.revision}")
    assert (again.folder, again.revision, again.downloaded) == (first.folder, first.revision, False)
    assert not cache.fetch(url).downloaded
    assert cache.downloads == [url]
    assert Cache(tmp_path / "cache").fetch(url).revision == first.revision, "another process of the node"
    assert Cache(tmp_path / "elsewhere").fetch(url).revision == first.revision, "another node"


def test_a_loaded_revision_is_served_and_no_newer_one(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url, cache = s3.put(adapters_dir / "legal-v2", "moving"), Cache(tmp_path / "cache")
    old = cache.fetch(url)
    s3.put(adapters_dir / "medical", "moving")
    assert cache.fetch(f"{url}#{old.revision}").folder == old.folder
    with pytest.raises(InvalidAdapter, match=f"expected revision {old.revision}"):
        Cache(tmp_path / "late").fetch(f"{url}#{old.revision}")
    new = cache.fetch(url)
    assert new.revision != old.revision
    assert same(new.folder, adapters_dir / "medical")


def test_concurrent_requests_cause_one_download(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url, cache = s3.put(adapters_dir / "legal-v2", "popular"), Cache(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda turn: cache.fetch(url).folder, range(8)))
    assert len(found) == len(cache.downloads) == 1


class CutFolder(RemoteFolder):
    """Reads small chunks, and breaks off in the weights' file after `limit` bytes."""

    limit: int | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url, chunk_bytes=10_000)
        self.starts: dict[str, int] = {}

    def read(self, name: str, start: int) -> Iterator[bytes]:
        self.starts[name] = start
        size = start
        for chunk in super().read(name, start):
            size += len(chunk)
            yield chunk
            if name == WEIGHTS_FILE and self.limit is not None and size > self.limit:
                raise ConnectionError("the connection broke")


class Cuts:
    """Opens folders whose reads break off while `limit` is set."""

    def __init__(self, limit: int) -> None:
        self.limit: int | None = limit
        self.opened: list[CutFolder] = []

    def __call__(self, url: str) -> CutFolder:
        folder = CutFolder(url)
        folder.limit = self.limit
        self.opened.append(folder)
        return folder


def test_an_interrupted_download_is_resumed(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    size = (adapters_dir / "legal-v2" / WEIGHTS_FILE).stat().st_size
    cuts = Cuts(limit=size // 2)
    url, cache = s3.put(adapters_dir / "legal-v2", "interrupted"), Cache(tmp_path / "cache", open_folder=cuts)
    with pytest.raises(Unavailable, match="the connection broke"):
        cache.fetch(url)
    cuts.limit = None
    found = cache.fetch(url)
    assert same(found.folder, adapters_dir / "legal-v2")
    assert size // 2 < cuts.opened[-1].starts[WEIGHTS_FILE] < size
    assert cache.downloads == [url]


def test_a_download_that_broke_off_while_its_marks_were_written_starts_again(
    s3: S3Bucket, adapters_dir: Path, tmp_path: Path
) -> None:
    cuts = Cuts(limit=50_000)
    url, cache = s3.put(adapters_dir / "legal-v2", "torn"), Cache(tmp_path / "cache", open_folder=cuts)
    with pytest.raises(Unavailable):
        cache.fetch(url)
    cuts.limit = None
    (marks,) = (tmp_path / "cache").glob("*.part/marks.json")
    marks.write_text("")
    assert same(cache.fetch(url).folder, adapters_dir / "legal-v2")
    assert cuts.opened[-1].starts[WEIGHTS_FILE] == 0


def test_a_corrupt_part_of_an_earlier_download_is_not_served(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    """The checksum of the source reveals the corruption, and the next attempt downloads the whole file."""
    cuts = Cuts(limit=50_000)
    url, cache = s3.put(adapters_dir / "legal-v2", "corrupt"), Cache(tmp_path / "cache", open_folder=cuts)
    with pytest.raises(Unavailable):
        cache.fetch(url)
    cuts.limit = None
    (part,) = (tmp_path / "cache").glob(f"*.part/{WEIGHTS_FILE}")
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(Unavailable, match="MD5"):
        cache.fetch(url)
    assert same(cache.fetch(url).folder, adapters_dir / "legal-v2")


def test_the_least_recently_used_entries_are_evicted(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    one = sum((adapters_dir / "legal-v2" / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    most_bytes = 2 * one + 20_000
    cache = Cache(tmp_path / "cache", most_bytes)
    urls = [s3.put(adapters_dir / "legal-v2", f"lru{number}") for number in range(3)]
    first, second = (cache.fetch(url) for url in urls[:2])
    third = cache.fetch(urls[2])
    assert all(found.folder.exists() for found in (first, second, third)), "recently used entries stay"
    cache = Cache(tmp_path / "cache", most_bytes, keep_used_s=0.0)
    cache.fetch(f"{urls[0]}#{first.revision}")
    cache.fetch(urls[2])
    assert [found.folder.exists() for found in (first, second, third)] == [True, False, True]
    assert cache.fetch(f"{urls[1]}#{second.revision}").downloaded


def test_an_entry_is_not_evicted_by_the_request_that_finds_it(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url = s3.put(adapters_dir / "legal-v2", "found")
    first = Cache(tmp_path / "cache").fetch(url)
    for file in first.folder.iterdir():
        os.utime(file, (0, 0))  # last used long ago
    small = Cache(tmp_path / "cache", max_bytes=0)
    assert small.fetch(url).folder == first.folder
    assert same(first.folder, adapters_dir / "legal-v2")
    assert small.downloads == []


def test_adapters_are_downloaded_over_http(adapters_dir: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with http_server(partial(SimpleHTTPRequestHandler, directory=str(adapters_dir))) as port:
        url = f"http://127.0.0.1:{port}"
        first = cache.fetch(f"{url}/medical")
        assert same(first.folder, adapters_dir / "medical")
        assert cache.fetch(f"{url}/medical#{first.revision}").folder == first.folder
        assert len(cache.downloads) == 1
        with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
            cache.fetch(f"{url}/nobody")
    with pytest.raises(Unavailable):
        cache.fetch(f"{url}/medical")


def test_each_error_contains_its_reason(s3: S3Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url = s3.put(adapters_dir / "legal-v2", "sound")
    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        Cache(tmp_path / "a").fetch(f"{s3.url}/absent")
    with pytest.raises(InvalidAdapter, match="at most 1000 bytes"):
        Cache(tmp_path / "b", max_adapter_bytes=1000).fetch(url)
    with pytest.raises(InvalidRequest, match="nosuch"):
        Cache(tmp_path / "c").fetch("nosuch://bucket/adapter")
    assert not list(tmp_path.glob(f"*/*/{WEIGHTS_FILE}"))


class Gated(Cache):
    """A cache whose first download waits for `gate`. Each download has another revision: r1, r2."""

    def __init__(self, root: Path, folder: Path) -> None:
        super().__init__(root)
        self.folder = folder
        self.started, self.gate = threading.Event(), threading.Event()

    def fetch(self, source: str) -> FetchedAdapter:
        self.downloads.append(source)
        number = len(self.downloads)
        self.started.set()
        assert number > 1 or self.gate.wait(60)
        return FetchedAdapter(self.folder, f"r{number}", downloaded=True)


FAR = ("far", "s3://models/far")


async def test_a_source_that_hangs_delays_only_its_own_adapter(adapters_dir: Path, tmp_path: Path) -> None:
    cache = Gated(tmp_path, adapters_dir / "legal-v2")
    resolver = AdapterResolver(cache, timeout_s=60)
    far = asyncio.create_task(resolver.resolve(*FAR))
    assert (await resolver.resolve("near", str(adapters_dir / "medical"))).adapter.name == "near"
    assert not far.done()
    cache.gate.set()
    found = await far
    assert (found.adapter.revision, found.downloaded) == ("r1", True)
    assert not (await resolver.resolve(*FAR)).downloaded


async def test_a_request_waits_for_a_download_up_to_the_time_limit(adapters_dir: Path, tmp_path: Path) -> None:
    cache = Gated(tmp_path, adapters_dir / "legal-v2")
    resolver = AdapterResolver(cache, timeout_s=0.05)
    with pytest.raises(StillLoading, match="download"):
        await resolver.resolve(*FAR)
    cache.gate.set()


async def test_a_check_that_began_before_an_invalidation_is_not_kept(adapters_dir: Path, tmp_path: Path) -> None:
    cache = Gated(tmp_path, adapters_dir / "legal-v2")
    resolver = AdapterResolver(cache, timeout_s=60)
    early = asyncio.create_task(resolver.resolve(*FAR))
    assert await asyncio.to_thread(cache.started.wait, 60)
    resolver.invalidate("far")
    assert (await resolver.resolve(*FAR)).adapter.revision == "r2"
    cache.gate.set()
    assert (await early).adapter.revision == "r1"
    assert (await resolver.resolve(*FAR)).adapter.revision == "r2"


async def test_files_are_checked_again_after_a_second(adapters_dir: Path, tmp_path: Path) -> None:
    now_s = 0.5
    cache = Gated(tmp_path, adapters_dir / "legal-v2")
    cache.gate.set()
    resolver = AdapterResolver(cache, timeout_s=60, clock=lambda: now_s)
    assert (await resolver.resolve(*FAR)).adapter.revision == "r1"
    now_s += 0.9
    assert (await resolver.resolve(*FAR)).adapter.revision == "r1"
    now_s += 0.2
    while (await resolver.resolve(*FAR)).adapter.revision == "r1":  # waits for the check, up to 0.2 s each time
        pass
    assert len(cache.downloads) == 2


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("s3://models/adapters/legal", True),
        ("s3://models/adapters", False),
        ("s3://models/adapters-private/legal", False),
        ("s3://models/adapters/../private/legal", False),
        ("simplecache::s3://models/adapters/legal", False),
        ("s3://models/adapters/legal::file:///etc", False),
        ("file:///etc", False),
        ("https://hub.example/team/legal", True),
        ("https://hub.example.evil/team/legal", False),
        ("https://hub.example/team/%2e%2e/legal", False),
        ("https://hub.example/team/legal?x=1", False),
        ("https://hub.example/team/legal#abc", False),
    ],
)
def test_only_allowed_urls_are_accepted(url: str, fine: bool) -> None:
    allowed = ("s3://models/adapters", "https://hub.example/")
    if fine:
        check_url_allowed(url, allowed)
    else:
        with pytest.raises(InvalidRequest, match=r"sources\.allowed"):
            check_url_allowed(url, allowed)
    with pytest.raises(InvalidRequest, match="nothing"):
        check_url_allowed(url, ())


@pytest.mark.parametrize(
    ("path", "allowed", "says"),
    [
        ("org/my-adapter", (), "write hf://org/my-adapter and add hf://org to sources.allowed, or download it"),
        ("org/my-adapter", ("hf://org",), "hub, write hf://org/my-adapter"),
        ("gone", (), "'gone' does not exist"),
        ("../other", (), "'../other' does not exist"),
        ("/data/gone", (), "'/data/gone' does not exist"),
    ],
)
def test_a_path_that_may_be_a_hub_id_gets_a_hint(path: str, allowed: tuple[str, ...], says: str) -> None:
    assert missing_folder(path, allowed).message.endswith(says)
