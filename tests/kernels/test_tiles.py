"""Tables of tiles: the exact entry, else the nearest, else a default."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from ranklet.kernels import tiles
from ranklet.kernels.tiles import (
    ExpandTile,
    FusedTile,
    ShrinkTile,
    TileKey,
    TileTable,
    default,
    fitted,
    from_entry,
    table,
    to_entry,
)

QKV = TileKey("shrink", 1024, (2048, 1024, 1024), 64, 128, 30_720)
TALL, SHORT = ShrinkTile(64, 1, 8, 3), ShrinkTile(128, 4, 4, 2)
TABLE = TileTable({QKV: TALL, QKV._replace(height=16, rows=256): SHORT}, "test", 227 << 10)


def test_exact_entry() -> None:
    assert TABLE.find(QKV) == TALL
    assert TABLE.find(QKV._replace(height=16, rows=256)) == SHORT


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        (QKV._replace(rows=20_000), TALL),
        (QKV._replace(height=64, rows=3000), TALL),
        (QKV._replace(height=32, rows=2000), SHORT),
        (QKV._replace(wide=4096, widths=(4096, 1024, 1024), rank=16, height=16, rows=17), SHORT),
    ],
    ids=["rows", "height before rows", "nearest height", "another model"],
)
def test_nearest_entry(key: TileKey, wanted: ShrinkTile) -> None:
    assert TABLE.find(key) == wanted


def test_a_distant_entry_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = TileTable({QKV: TALL}, "some.json", 227 << 10)
    for _ in range(2):
        found.find(QKV._replace(rows=16_000))
        found.find(QKV._replace(rows=1))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "some.json has no tile for TileKey(op='shrink'" in caplog.text


def test_default_without_a_similar_entry() -> None:
    for key in (QKV._replace(op="expand"), QKV._replace(widths=(1024,)), QKV._replace(op="fused")):
        assert type(TABLE.find(key)) is tiles.KINDS[key.op]
    assert TileTable({}, "empty", 227 << 10).find(QKV) == default(QKV)


@pytest.mark.parametrize(
    ("tile", "key", "shared_bytes", "wanted"),
    [
        (ShrinkTile(64, 1, 4, 4), QKV, 227 << 10, ShrinkTile(64, 1, 4, 4)),
        (ShrinkTile(64, 1, 4, 4), QKV._replace(itemsize=4), 227 << 10, ShrinkTile(64, 1, 4, 2)),
        (ShrinkTile(128, 1, 4, 4), QKV._replace(rank=128), 99 << 10, ShrinkTile(64, 1, 4, 1)),
        (ExpandTile(256, 8, 4, 3), QKV._replace(op="expand"), 99 << 10, ExpandTile(128, 8, 4, 1)),
        (FusedTile(256, 64, 8, 2, 8, 4), QKV._replace(op="fused"), 227 << 10, FusedTile(256, 64, 8, 2, 8, 4)),
        (FusedTile(256, 64, 8, 1, 8, 4), QKV._replace(op="fused"), 227 << 10, FusedTile(256, 64, 8, 1, 8, 3)),
        (ShrinkTile(32, 1, 4, 1), QKV._replace(rank=4096), 1024, ShrinkTile(32, 1, 4, 1)),
    ],
    ids=["fits", "float32", "step in half", "columns in half", "fused fits", "fused", "least of all"],
)
def test_tiles_are_fitted_to_shared_memory(
    tile: tiles.Tile, key: TileKey, shared_bytes: int, wanted: tiles.Tile
) -> None:
    assert fitted(tile, key, shared_bytes) == wanted


def test_float32_never_uses_a_tile_tuned_for_16_bits() -> None:
    """Such a tile would need too much shared memory, and minutes to compile."""
    found = TileTable({QKV: TALL}, "test", 227 << 10)
    assert found.find(QKV) == TALL
    wide = [found.find(QKV._replace(itemsize=4, rows=rows)) for rows in (1, 30_720)]
    assert wide == [default(QKV._replace(itemsize=4))] * 2
    assert wide[0] != TALL


def test_the_interpreter_has_an_empty_table() -> None:
    assert table(None).find(QKV) == fitted(default(QKV), QKV, 99 << 10)


@pytest.mark.parametrize("tuned_with", [triton.__version__, "0.1"])
def test_a_gpus_table_file(
    tuned_with: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    gpu = SimpleNamespace(name="NVIDIA H200/80", shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    fused = FusedTile(256, 64, 8, 2, 8, 4, pays=False)
    entries = [to_entry(QKV, TALL, 0.04), to_entry(QKV._replace(op="fused"), fused, 0.4)]
    (tmp_path / "NVIDIA_H200-80.json").write_text(json.dumps({"triton": tuned_with, "tiles": entries}))
    table.cache_clear()
    try:
        assert table(0).find(QKV) == TALL
        assert table(0).find(QKV._replace(op="fused")) == fused
    finally:
        table.cache_clear()
    assert ("was tuned with Triton 0.1" in caplog.text) == (tuned_with == "0.1")


def test_a_gpu_without_a_table_logs_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="Other"))
    table.cache_clear()
    try:
        assert table(0).find(QKV) == fitted(default(QKV), QKV, 99 << 10)
    finally:
        table.cache_clear()
    assert "no Other.json: using default tiles; `ranklet tune` measures this GPU" in caplog.text


def test_every_shipped_table_can_be_read() -> None:
    for path in tiles.TUNED.glob("*.json"):
        content = json.loads(path.read_text())
        assert {"gpu", "triton", "torch", "date", "tiles"} <= set(content)
        assert path == tiles.path_for(content["gpu"])
        assert all(from_entry(entry) for entry in content["tiles"])
