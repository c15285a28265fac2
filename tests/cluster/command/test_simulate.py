"""`ranklet simulate` on the command line."""

import json
from pathlib import Path

import pytest

from ranklet.cluster.command.cli import main

SMALL = ["--replicas", "4", "--adapters", "20", "--workers", "1", "--rules", "ranklet"]


def test_a_flash_crowd_adds_its_effect_to_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = ["--seconds", "6", "--warm-s", "1", "--flash-s", "3"]
    assert main(["simulate", *SMALL, *times, "--out", str(tmp_path / "o.json")]) == 0
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert min(row["steady_p99_ms"], row["worst_p99_ms"]) > 0
    assert 0 <= row["recovered_s"] <= 3
    printed = capsys.readouterr().out
    assert f"{row['worst_p99_ms']:.4g}" in printed
    assert "…" not in printed, "a number or a heading is cut off"


@pytest.mark.parametrize("flash_s", ["0", "4", "4.9", "6", "9"])
def test_a_flash_crowd_outside_the_measured_time_is_refused(flash_s: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "--seconds", "6", "--flash-s", flash_s]) == 1
    assert "--flash-s: expected at least 5" in capsys.readouterr().err
