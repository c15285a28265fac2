"""Adapters fetched from a real S3 server and over HTTP: once, whole, of the revision asked for, within the bound."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from ranklet.cluster.catalog import remote
from ranklet.cluster.catalog.remote import RemoteCache, check_url_allowed
from ranklet.cluster.catalog.resolver import AdapterResolver
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, StillLoading, Unavailable
from tests.cluster.catalog.bucket import Bucket, bucket


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    with bucket() as made:
        yield made


@pytest.fixture
def s3(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setitem(fsspec.config.conf, "s3", served.settings)
    return served


class Cache(RemoteCache):
    """A cache that counts its downloads."""

    def __init__(self, root: Path, most_bytes: int = 1 << 30, most_adapter_bytes: int = 1 << 30) -> None:
        self.downloads: list[str] = []
        super().__init__(root, most_bytes, most_adapter_bytes, lambda url, seconds, size: self.downloads.append(url))


def same(folder: Path, original: Path) -> bool:
    return all((folder / name).read_bytes() == (original / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))


def test_an_adapter_is_fetched_once(s3: Bucket, adapters_dir: Path, tmp_path: Path) -> None:
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


def test_what_was_loaded_is_served_and_nothing_newer(s3: Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url, cache = s3.put(adapters_dir / "legal-v2", "moving"), Cache(tmp_path / "cache")
    old = cache.fetch(url)
    s3.put(adapters_dir / "medical", "moving")
    assert cache.fetch(f"{url}#{old.revision}").folder == old.folder
    with pytest.raises(InvalidAdapter, match="has changed"):
        Cache(tmp_path / "late").fetch(f"{url}#{old.revision}")
    new = cache.fetch(url)
    assert new.revision != old.revision
    assert same(new.folder, adapters_dir / "medical")


def test_many_who_ask_at_once_cause_one_download(s3: Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url, cache = s3.put(adapters_dir / "legal-v2", "popular"), Cache(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda turn: cache.fetch(url).folder, range(8)))
    assert len(found) == len(cache.downloads) == 1


def test_a_download_that_broke_off_goes_on(
    s3: Bucket, adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_CHUNK", 10_000)
    url, cache = s3.put(adapters_dir / "legal-v2", "broken-off"), Cache(tmp_path / "cache")
    size = (adapters_dir / "legal-v2" / WEIGHTS_FILE).stat().st_size
    read: list[int] = []

    def grown(cache: RemoteCache, url: str, others: int, now: int) -> None:
        read.append(now)
        if breaking and others and now > size // 2:
            raise ConnectionError("the wire was cut")

    monkeypatch.setattr(RemoteCache, "_refuse_large", grown)
    breaking = True
    with pytest.raises(Unavailable, match="the wire was cut"):
        cache.fetch(url)
    breaking, had = False, read[-1]
    read.clear()
    found = cache.fetch(url)
    assert same(found.folder, adapters_dir / "legal-v2")
    assert min(now for now in read if now > had // 2) > had, "it began behind what it had"
    assert cache.downloads == [url]


def test_what_came_wrong_is_not_served(s3: Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    """A part of an earlier try that is not what the source has: its checksum tells, and the next try is whole."""
    url, cache = s3.put(adapters_dir / "legal-v2", "rotten"), Cache(tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "_CHUNK", 10_000)

        def cut(cache: RemoteCache, url: str, others: int, now: int) -> None:
            if others and now > 50_000:
                raise ConnectionError

        patched.setattr(RemoteCache, "_refuse_large", cut)
        with pytest.raises(Unavailable):
            cache.fetch(url)
    (part,) = (tmp_path / "cache").glob(f"*.part/{WEIGHTS_FILE}")
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(Unavailable, match="MD5"):
        cache.fetch(url)
    assert same(cache.fetch(url).folder, adapters_dir / "legal-v2")


def test_the_least_recently_used_make_room(
    s3: Bucket, adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sum((adapters_dir / "legal-v2" / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    cache = Cache(tmp_path / "cache", most_bytes=2 * one + 20_000)
    urls = [s3.put(adapters_dir / "legal-v2", f"lru{number}") for number in range(3)]
    first, second = (cache.fetch(url) for url in urls[:2])
    third = cache.fetch(urls[2])
    assert all(found.folder.exists() for found in (first, second, third)), "all were used just now"
    monkeypatch.setattr(remote, "_JUST_USED_S", 0.0)
    cache.fetch(f"{urls[0]}#{first.revision}")
    cache.fetch(urls[2])
    assert [found.folder.exists() for found in (first, second, third)] == [True, False, True]
    assert cache.fetch(f"{urls[1]}#{second.revision}").downloaded


def test_plain_https_servers_too(adapters_dir: Path, tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(adapters_dir))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            cache = Cache(tmp_path / "cache")
            first = cache.fetch(f"{url}/medical")
            assert same(first.folder, adapters_dir / "medical")
            assert cache.fetch(f"{url}/medical#{first.revision}").folder == first.folder
            assert len(cache.downloads) == 1
            with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
                cache.fetch(f"{url}/nobody")
        finally:
            server.shutdown()
            thread.join()
        server.server_close()
        with pytest.raises(Unavailable):
            cache.fetch(f"{url}/medical")


def test_each_refusal_says_why(s3: Bucket, adapters_dir: Path, tmp_path: Path) -> None:
    url = s3.put(adapters_dir / "legal-v2", "sound")
    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        Cache(tmp_path / "a").fetch(f"{s3.url}/absent")
    with pytest.raises(InvalidAdapter, match="at most 1000 bytes"):
        Cache(tmp_path / "b", most_adapter_bytes=1000).fetch(url)
    with pytest.raises(InvalidRequest, match="nosuch"):
        Cache(tmp_path / "c").fetch("nosuch://bucket/adapter")
    assert not list(tmp_path.glob(f"*/*/{WEIGHTS_FILE}"))


async def test_a_source_that_hangs_holds_up_its_own_adapter_alone(adapters_dir: Path, tmp_path: Path) -> None:
    gate = threading.Event()

    class Hanging(Cache):
        def fetch(self, place: str) -> remote.FetchedAdapter:
            gate.wait(20)
            return remote.FetchedAdapter(adapters_dir / "legal-v2", "r1", downloaded=True)

    resolver = AdapterResolver(Hanging(tmp_path), timeout_s=0.2)
    with pytest.raises(StillLoading, match="download"):
        await resolver.resolve("far", "s3://models/far")
    assert (await resolver.resolve("near", str(adapters_dir / "medical"))).adapter.name == "near"
    gate.set()
    found = await resolver.resolve("far", "s3://models/far")
    assert (found.adapter.revision, found.downloaded) == ("r1", True)
    assert not (await resolver.resolve("far", "s3://models/far")).downloaded


async def test_a_look_that_began_before_a_change_was_told_is_not_believed(adapters_dir: Path, tmp_path: Path) -> None:
    gate, revisions = threading.Event(), iter(("old", "new"))

    class Changing(Cache):
        def fetch(self, place: str) -> remote.FetchedAdapter:
            revision = next(revisions)
            assert revision == "new" or gate.wait(20)
            return remote.FetchedAdapter(adapters_dir / "legal-v2", revision, downloaded=True)

    resolver = AdapterResolver(Changing(tmp_path), timeout_s=10)
    early = asyncio.create_task(resolver.resolve("far", "s3://models/far"))
    await asyncio.sleep(0.1)
    resolver.invalidate("far")
    assert (await resolver.resolve("far", "s3://models/far")).adapter.revision == "new"
    gate.set()
    assert (await early).adapter.revision == "old"
    assert (await resolver.resolve("far", "s3://models/far")).adapter.revision == "new"


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
def test_only_what_is_allowed_can_be_named(url: str, fine: bool) -> None:
    allowed = ("s3://models/adapters", "https://hub.example/")
    if fine:
        check_url_allowed(url, allowed)
    else:
        with pytest.raises(InvalidRequest, match=r"sources\.allowed"):
            check_url_allowed(url, allowed)
    with pytest.raises(InvalidRequest, match="nothing"):
        check_url_allowed(url, ())
