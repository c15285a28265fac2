"""The tuner from candidates to table file, with Triton's interpreter in place of a GPU."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ranklet.kernels.crossover import Crossover, from_entry, to_entry
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.shrink import shrink
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import KINDS, ShrinkTile
from ranklet.kernels.tuning import tune
from ranklet.kernels.tuning.candidates import FEW_ROWS, WORKLOADS, Workload, candidates, cases
from ranklet.kernels.tuning.random_lora import ProjectionShape, projections, random_lora
from tests.bench.shapes import QWEN3_EMBEDDING_06B

CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = tune.TunePlan(
    (ProjectionShape("gate_up", 128, (96, 96)),), (16,),
    (Workload("distinct", 4, 3, 2), Workload("identical", 1, 70, 1)),
    DEVICE, torch.float16,
)  # fmt: skip
WRONG = ShrinkTile(64, 1, 4, 4)  # a candidate of both workloads


def test_a_layer_has_four_projections() -> None:
    found = {p.name: (p.wide, p.widths) for p in projections(QWEN3_EMBEDDING_06B.module_dims())}
    assert found == {
        "qkv": (1024, (2048, 1024, 1024)), "o": (2048, (1024,)), "gate_up": (1024, (3072, 3072)),
        "down": (3072, (1024,)),
    }  # fmt: skip


def test_every_tile_height_has_candidates_of_the_right_kind() -> None:
    found = cases(WORKLOADS)
    assert {height for height, _ in found} == {16, 32, 64, 128}
    for height, rows in found:
        for op in tune.OPS:
            tried = candidates(op, height, rows)
            assert len(set(tried)) == len(tried) <= 12
            assert all(isinstance(tile, KINDS[op]) for tile in tried)
            assert tried or (op == "fused" and rows <= FEW_ROWS)


def test_random_lora_is_zero_beyond_its_rank() -> None:
    made = random_lora(ProjectionShape("qkv", 24, (16, 8, 8)), 3, 2, device=CPU, dtype=torch.float32)
    assert made.stack.rank == 16
    a = made.stack.a.view(2, 3, 16, 24)
    assert a[:, :, :3].all()
    assert not a[:, :, 3:].any()
    assert made.stack.b[:, :, :3].all()
    assert not made.stack.b[:, :, 3:].any()


def test_the_best_right_candidate_of_each_launch_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:

    def wrong(x: Tensor, h: Tensor, stack: LinearStack, tiles: RowTiles, tile: ShrinkTile, *, chained: bool) -> None:
        shrink(x, h, stack, tiles, tile, chained=chained)
        if tile == WRONG:
            h[0, 0] = 0

    monkeypatch.setattr("ranklet.kernels.tuning.launches.shrink", wrong)
    (entries,) = tune.tune_tiles(TINY, workers=0)
    assert {(e["op"], e["height"], e["rows"]) for e in entries} == {
        ("shrink", 16, 12), ("expand", 16, 12), ("shrink", 128, 70), ("expand", 128, 70),
    }  # fmt: skip
    assert all(e["k"] == 128 and e["widths"] == [96, 96] and e["rank"] == 16 and e["ms"] > 0 for e in entries)
    for entry in entries:
        chosen = KINDS[entry["op"]](**entry["tile"])
        assert chosen in candidates(entry["op"], entry["height"], entry["rows"])
        assert chosen != WRONG
    output = " ".join(capsys.readouterr().err.split())
    assert output.count("dropped:") == output.count(f"dropped: {WRONG} on") == 2
    path = tmp_path / "gpu.json"
    tune.write(path, tiles=entries)
    assert json.loads(path.read_text())["tiles"] == entries


def test_new_entries_are_merged_into_the_table_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    key = {"op": "shrink", "k": 8, "widths": [8], "rank": 16, "height": 16, "rows": 4}
    tune.write(path, tiles=[{**key, "tile": {"split": 1}, "ms": 2.0}, {**key, "rank": 32, "tile": {}, "ms": 1.0}])
    measured = to_entry(Crossover(256, 4, 8, 1024, "layer", {"native": 2.0, "csgmv": 1.0}))
    tune.write(path, crossovers=[measured])
    tune.write(path, tiles=[{**key, "tile": {"split": 2}, "ms": 3.0}])
    content = json.loads(path.read_text())
    assert [(e["rank"], e["ms"]) for e in content["tiles"]] == [(16, 3.0), (32, 1.0)]
    assert [from_entry(entry) for entry in content["crossovers"]] == [
        Crossover(256, 4, 8, 1024, "layer", {"native": 2.0, "csgmv": 1.0})
    ]
    assert {"gpu", "triton", "torch", "date"} < set(content)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a CUDA device"):
        tune.tune(QWEN3_EMBEDDING_06B.module_dims(), [64])
