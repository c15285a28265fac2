"""Half of an adapter is not served, and files that hang hold up no other adapter."""

import asyncio
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from ranklet.cluster.catalog import resolver as resolver_module
from ranklet.cluster.catalog.lanes import Lanes, place_of
from ranklet.cluster.catalog.remote import FetchedAdapter, RemoteCache
from ranklet.cluster.catalog.resolver import SETTLE_S, AdapterResolver
from ranklet.replicas.adapters import mounts
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import InvalidAdapter

HANGING = [f"https://hub/{number}" for number in range(40)]


class SilentCache(RemoteCache):
    """Has one adapter. Never answers for others."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 1 << 30, 1 << 30)
        self.asked: list[str] = []
        self.began, self.over = threading.Event(), threading.Event()

    def find(self, source: str) -> FetchedAdapter | None:
        return FetchedAdapter(self.root, "r1", downloaded=False) if source.endswith("#r1") else None

    def fetch(self, source: str) -> FetchedAdapter:
        self.asked.append(source)
        self.began.set()
        if not source.startswith("s3:"):
            self.over.wait(60)
        return FetchedAdapter(self.root, "r2", downloaded=True)


async def test_a_folder_that_is_being_written_is_served_once_it_is_whole(adapters_dir: Path, tmp_path: Path) -> None:
    source, folder = adapters_dir / "legal-v2", tmp_path / "legal"
    folder.mkdir()
    shutil.copyfile(source / CONFIG_FILE, folder / CONFIG_FILE)
    resolver = AdapterResolver(RemoteCache(tmp_path / "cache", 1, 1 << 30), timeout_s=60)
    asked = asyncio.create_task(resolver.resolve("legal", str(folder)))
    content = (source / WEIGHTS_FILE).read_bytes()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for start in range(0, len(content), len(content) // 4 + 1):
            file.write(content[start : start + len(content) // 4 + 1])
            file.flush()
            await asyncio.sleep(SETTLE_S / 3)
            assert not asked.done()
    assert (await asked).adapter.revision == revision_of(folder)


def always_checking(tmp_path: Path) -> AdapterResolver:
    """Return a resolver for which each call comes 10 s after the one before."""
    now_s = itertools.count(step=10)
    return AdapterResolver(RemoteCache(tmp_path / "cache", 1, 1 << 30), timeout_s=60, clock=lambda: next(now_s))


@pytest.mark.parametrize("part", ["half", "within the header", "empty"])
async def test_a_copy_over_an_adapter_that_stalls_leaves_the_revision(
    adapters_dir: Path, tmp_path: Path, part: str
) -> None:
    folder, resolver = shutil.copytree(adapters_dir / "legal-v2", tmp_path / "legal"), always_checking(tmp_path)
    before = (await resolver.resolve("legal", str(folder))).adapter.revision
    content = (adapters_dir / "medical" / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(
        content[: {"half": len(content) // 2, "within the header": 100, "empty": 0}[part]]
    )
    await asyncio.sleep(SETTLE_S * 1.1)
    assert (await resolver.resolve("legal", str(folder))).adapter.revision == before
    (folder / WEIGHTS_FILE).write_bytes(content)
    await asyncio.sleep(SETTLE_S * 1.1)
    assert (await resolver.resolve("legal", str(folder))).adapter.revision == revision_of(folder) != before


async def test_a_copy_that_stopped_long_ago_is_a_fault(
    adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver_module, "STALLED_S", SETTLE_S)
    folder, resolver = shutil.copytree(adapters_dir / "legal-v2", tmp_path / "legal"), always_checking(tmp_path)
    before = (await resolver.resolve("legal", str(folder))).adapter.revision
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    await asyncio.sleep(SETTLE_S * 1.1)
    assert (await resolver.resolve("legal", str(folder))).adapter.revision == revision_of(folder) != before


async def test_files_whose_times_lie_in_the_future_are_served_after_a_second(
    adapters_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters_dir / "legal-v2", tmp_path / "legal")
    os.utime(folder / WEIGHTS_FILE, (time.time() + 3600, time.time() + 3600))
    resolver = AdapterResolver(RemoteCache(tmp_path / "cache", 1, 1 << 30), timeout_s=60)
    assert (await resolver.resolve("legal", str(folder))).adapter.revision == revision_of(folder)


async def test_a_silent_host_holds_up_neither_others_nor_what_the_cache_has(adapters_dir: Path, tmp_path: Path) -> None:
    cache = SilentCache(tmp_path)
    resolver = AdapterResolver(cache, timeout_s=60)
    stuck = [asyncio.create_task(resolver.resolve(source, source)) for source in HANGING]
    assert await asyncio.to_thread(cache.began.wait, 60)
    for source, revision in (("s3://models/far", "r2"), ("https://hub/cached#r1", "r1")):
        assert (await resolver.resolve("far", source)).adapter.revision == revision
    assert (await resolver.resolve("near", str(adapters_dir / "medical"))).adapter.name == "near"
    assert sum(source.startswith("https:") for source in cache.asked) < len(HANGING) / 2
    cache.over.set()
    assert {(await each).adapter.revision for each in stuck} == {"r2"}


async def test_one_folder_takes_two_threads_however_often_it_is_asked(tmp_path: Path) -> None:
    lanes, over, began = Lanes(), threading.Event(), list[int]()

    def hang() -> None:
        began.append(1)
        over.wait(60)

    stuck = [asyncio.create_task(lanes.run(str(tmp_path / "hangs"), hang)) for _ in range(20)]
    await lanes.run(str(tmp_path / "other"), lambda: None)
    assert len(began) <= 2
    over.set()
    await asyncio.gather(*stuck)


def test_the_place_of_a_source_is_its_mount_or_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /mnt/far\\040away rw - nfs b rw\n")
    monkeypatch.setattr(mounts, "TABLE", table)
    assert place_of("/mnt/far away/legal") == "/mnt/far away"
    assert place_of("/mnt/far/legal") == "/"
    assert place_of("s3://models/legal#r1") == "s3://models"


async def test_links_out_of_the_roots_are_refused(adapters_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "legal"
    folder.mkdir(parents=True)
    shutil.copyfile(adapters_dir / "legal-v2" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).symlink_to(adapters_dir / "legal-v2" / CONFIG_FILE)
    cache = RemoteCache(tmp_path / "cache", 1, 1 << 30)
    with pytest.raises(InvalidAdapter, match="a link that leaves"):
        await AdapterResolver(cache, 60, roots=[tmp_path / "root"]).resolve("legal", str(folder))
    assert (await AdapterResolver(cache, 60, roots=[adapters_dir]).resolve("legal", str(folder))).adapter.marks
