"""`ranklet profile`: where a batch's time goes, stage by stage, beside the least it could take."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import BACKENDS, EngineConfig

if TYPE_CHECKING:  # torch, which other commands need not wait for
    from ranklet.replicas.profiling.profiler import Profile

_GROUP = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_GPU_BACKENDS = ("csgmv",)
_WIDTH = 110


def add(commands: Any) -> None:
    """The subcommand's parser."""
    parser = commands.add_parser("profile", help="where a batch's time goes on this machine, stage by stage")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the base model")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", default=[], metavar="FOLDER", help="prompts take them in turn"
    )
    parser.add_argument("--adapters-dir", type=Path, metavar="DIR", help="every adapter folder in it, by name")
    parser.add_argument("--distinct", type=int, metavar="N", help="only the first N adapters; 0: the base alone")
    parser.add_argument(
        "--prompts", nargs="+", default=["5x6144"], metavar="COUNTxTOKENS", help="the batch (default: 5x6144)"
    )
    parser.add_argument(
        "--rank", "--max-rank", dest="max_rank", type=int, default=64, help="of the slots (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of LoRA (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs, whose median counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers")
    parser.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    from ranklet.replicas.errors import RankletError
    from ranklet.replicas.profiling.profiler import profile

    lengths, folders = lengths_of(asked.prompts), _folders(asked)
    if asked.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {asked.repeats}")
    if asked.out and not asked.out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {asked.out}")
    _check_device(asked.device, asked.backend)
    config = EngineConfig(
        asked.model, device=asked.device, slots=max(1, len(folders)), max_rank=asked.max_rank,
        max_batch_tokens=max(sum(lengths), 1024), max_batch_requests=max(len(lengths), 512), backend=asked.backend,
        base_aliases=("*",),
    )  # fmt: skip
    try:
        adapters = [Revisions().reference(path.name, str(path)) for path in folders]
        found = profile(config, adapters, lengths, asked.repeats)
    except RankletError as error:
        raise ValueError(error.message) from None
    console = Console()
    show(found, console if console.is_terminal else Console(width=_WIDTH))
    if asked.out:
        derived = {"floor_ms": found.floor_ms, "launch_bound": found.launch_bound}
        asked.out.write_text(json.dumps(dataclasses.asdict(found) | derived, indent=1) + "\n")
    return 0


def _folders(asked: argparse.Namespace) -> list[Path]:
    """The adapters to take."""
    folders = list(asked.adapters)
    if asked.adapters_dir:
        found = sorted(path.parent for path in asked.adapters_dir.glob(f"*/{CONFIG_FILE}"))
        if not found:
            raise ValueError(f"--adapters-dir: expected a folder of PEFT folders, got {asked.adapters_dir}, with none")
        folders += found
    distinct = len(folders) if asked.distinct is None else asked.distinct
    if not 0 <= distinct <= len(folders):
        raise ValueError(f"--distinct: expected 0 to {len(folders)}, as many as adapters are given, got {distinct}")
    return folders[:distinct]


def _check_device(device: str, backend: str) -> None:
    import torch

    if not _DEVICE.fullmatch(device):
        raise ValueError(f"--device: expected cuda, cuda:0, cpu or auto, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a device that PyTorch sees, got {device} and it sees no GPU; try cpu")
    if backend in _GPU_BACKENDS and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"--backend: {backend} needs a GPU; try native or auto")


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
        "as large products and a large copy were timed just now",
    )
    for column in ("stage", "calls", "ms", "floor", "gap", "bound by", "LoRA adds", "floor", "of all"):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    worst = max(found.stages, key=lambda stage: stage.gap_ms)
    total = sum(stage.ms + stage.lora_ms for stage in found.stages)
    for stage in found.stages:
        share = (stage.ms + stage.lora_ms) / total
        table.add_row(
            stage.name, str(stage.calls), f"{stage.ms:.2f}", f"{stage.floor_ms:.2f}", f"{stage.gap_ms:.2f}",
            stage.bound, *(f"{ms:.2f}" if found.adapters else "" for ms in (stage.lora_ms, stage.lora_floor_ms)),
            f"{share:.0%}", style="bold" if stage is worst else "",
        )  # fmt: skip
    console.print(table)
    rate, most = found.tokens / found.lora_ms * 1e3, found.tokens / found.floor_ms * 1e3
    console.print(f"whole batch {found.lora_ms:.2f} ms = {rate:,.0f} tokens/s; without LoRA {found.base_ms:.2f} ms")
    console.print(f"all stages {total:.2f} ms, floor {found.floor_ms:.2f} ms = {most:,.0f} tokens/s")
    console.print(f"largest gap: {worst.name}, {worst.gap_ms:.2f} ms")
    if found.device != "cpu":
        console.print(f"kernel by kernel Python launches it in {found.launch_ms:.2f} ms of {found.eager_ms:.2f} ms")
    if found.launch_bound:
        console.print("launch bound: the device waits for Python, and the stages' times hold the waiting")
