"""`ranklet profile`: where a batch's time goes, stage by stage, beside the least it could take."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ranklet.replicas.config import BACKENDS, EngineConfig
from ranklet.replicas.reference import AdapterRef, revision_of

if TYPE_CHECKING:  # torch, which other commands need not wait for
    from ranklet.replicas.profile import Profile

_GROUP = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_WIDTH = 110


def add(commands: Any) -> None:
    """The subcommand's parser."""
    parser = commands.add_parser("profile", help="where a batch's time goes on this machine, stage by stage")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the base model")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", default=[], metavar="FOLDER", help="prompts take them in turn"
    )
    parser.add_argument(
        "--prompts", nargs="+", default=["5x6144"], metavar="COUNTxTOKENS", help="the batch (default: 5x6144)"
    )
    parser.add_argument("--max-rank", type=int, default=64, help="of the slots (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of LoRA (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs, whose median counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers")
    parser.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    from ranklet.replicas.errors import RankletError
    from ranklet.replicas.profile import profile

    lengths = lengths_of(asked.prompts)
    if asked.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {asked.repeats}")
    config = EngineConfig(
        asked.model, device=asked.device, slots=max(1, len(asked.adapters)), max_rank=asked.max_rank,
        max_batch_tokens=max(sum(lengths), 1024), backend=asked.backend, base_aliases=("*",),
    )  # fmt: skip
    try:
        adapters = [AdapterRef(path.name, str(path), revision_of(path)) for path in asked.adapters]
        found = profile(config, adapters, lengths, asked.repeats)
    except RankletError as error:
        raise ValueError(error.message) from None
    console = Console()
    show(found, console if console.is_terminal else Console(width=_WIDTH))
    if asked.out:
        asked.out.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return 0


def lengths_of(groups: list[str]) -> list[int]:
    """`["2x6144", "3x512"]` -> two prompts of 6144 tokens and three of 512.

    Raises:
        ValueError: a group is not COUNTxTOKENS.
    """
    lengths: list[int] = []
    for group in groups:
        found = _GROUP.fullmatch(group)
        if not found:
            raise ValueError(f"--prompts: expected COUNTxTOKENS such as 5x6144, got {group!r}")
        lengths += [int(found[2])] * int(found[1])
    return lengths


def show(found: "Profile", console: Console) -> None:
    """Print it, the stage with the largest gap in bold."""
    ceilings, shape = found.ceilings, f"{found.tokens} tokens, {found.prompts} prompts, {found.adapters} adapters"
    table = Table(
        title=f"{shape} ({found.backend}), {found.device}",
        caption=f"floors: {ceilings.operations_per_s / 1e12:.1f} TFLOP/s and {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        "as a large product and a large copy were timed just now",
    )
    for column in ("stage", "calls", "ms", "floor", "gap", "bound by", "LoRA adds", "floor", "of all"):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    gaps = {stage.name: stage.ms + stage.lora_ms - stage.floor_ms - stage.lora_floor_ms for stage in found.stages}
    worst, total = max(gaps, key=gaps.__getitem__), sum(stage.ms + stage.lora_ms for stage in found.stages)
    for stage in found.stages:
        share = (stage.ms + stage.lora_ms) / total
        table.add_row(
            stage.name, str(stage.calls), f"{stage.ms:.2f}", f"{stage.floor_ms:.2f}", f"{gaps[stage.name]:.2f}",
            stage.bound, f"{stage.lora_ms:.2f}" if found.adapters else "", f"{stage.lora_floor_ms:.2f}",
            f"{share:.0%}", style="bold" if stage.name == worst else "",
        )  # fmt: skip
    console.print(table)
    rate, most = found.tokens / found.lora_ms * 1e3, found.tokens / found.floor_ms * 1e3
    console.print(f"whole batch {found.lora_ms:.2f} ms = {rate:,.0f} tokens/s; without LoRA {found.base_ms:.2f} ms")
    console.print(f"all stages {total:.2f} ms, floor {found.floor_ms:.2f} ms = {most:,.0f} tokens/s")
    console.print(f"largest gap: {worst}, {gaps[worst]:.2f} ms")
    if found.device != "cpu":
        console.print(f"Python launches the batch in {found.launch_ms:.2f} ms, when no CUDA graph replays it")
