"""`ranklet profile` on the command line."""

import json
from pathlib import Path

import pytest

from ranklet.cluster.command.cli import main
from ranklet.cluster.command.profile import parse_lengths
from tests.assets.adapters import AdapterSpec


def test_every_stage_is_printed_and_written(
    model_dir: Path, adapter_specs: list[AdapterSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    adapter = str(adapter_specs[0].path)
    given = ["profile", "--model", str(model_dir), "--adapters", adapter, "--prompts", "2x30", "1x9", "--repeats", "2"]
    assert main([*given, "--out", str(out)]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert (found["tokens"], found["prompts"], found["adapters"]) == (69, 3, 1)
    assert all(stage["name"] in printed for stage in found["stages"])
    assert "largest gap" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "5*6144"], "expected COUNTxTOKENS"),
        (["--prompts", "0x3"], "expected COUNTxTOKENS"),
        (["--repeats", "0"], "--repeats: expected at least 1"),
        (["--adapters", "/nowhere"], "does not exist"),
        (["--adapters-dir", "/nowhere"], "--adapters-dir: expected a folder that contains PEFT folders"),
        (["--distinct", "1"], "--distinct: expected 0 to 0"),
        (["--device", "gpu"], "--device: expected cuda, cuda:0, cpu or auto"),
        (["--device", "cpu", "--backend", "csgmv"], "csgmv needs a GPU"),
        (["--prompts", "1x5000"], "at most 4096 tokens a prompt"),
        (["--rank", "0"], "max_rank: expected at least 1"),
        (["--out", "/nowhere/out.json"], "--out: expected a file in a folder that exists"),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: list[str], message: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--model", str(model_dir), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("distinct", "adapters"), [("2", 2), ("0", 0)])
def test_distinct_limits_the_adapters_of_a_folder(
    distinct: str, adapters: int, model_dir: Path, adapters_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--adapters-dir", str(adapters_dir), "--distinct", distinct, "--prompts", "3x9", "--repeats", "1"]
    assert main(["profile", "--model", str(model_dir), *given]) == 0
    assert f"27 tokens, 3 prompts, {adapters} adapters" in capsys.readouterr().out


def test_prompt_groups_are_parsed() -> None:
    assert parse_lengths(["2x6144", "3x5"]) == [6144, 6144, 5, 5, 5]
