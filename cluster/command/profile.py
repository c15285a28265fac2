"""`ranklet profile`: the time of each stage of a batch beside the least time that the device allows."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ranklet.cluster.command.console import open_console
from ranklet.replicas.adapters.reference import CONFIG_FILE
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import BACKENDS, EngineConfig

if TYPE_CHECKING:  # the profiler imports torch, which takes seconds
    from ranklet.replicas.profiling.profiler import Profile

_GROUP = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def add(commands: Any) -> None:
    parser = commands.add_parser("profile", help="time each stage of a batch on this machine")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of the base model")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders that prompts use in turn"
    )
    parser.add_argument(
        "--adapters-dir", type=Path, metavar="DIR", help="use every adapter folder in DIR, in order of name"
    )
    parser.add_argument(
        "--distinct", type=int, metavar="N", help="use only the first N adapters; 0 for only the base model"
    )
    parser.add_argument(
        "--prompts", nargs="+", default=["5x6144"], metavar="COUNTxTOKENS", help="the batch (default: 5x6144)"
    )
    parser.add_argument(
        "--rank", "--max-rank", dest="max_rank", type=int, default=64, help="largest LoRA rank (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="LoRA backend (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs; medians are reported (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers to this file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from ranklet.replicas.errors import RankletError
    from ranklet.replicas.profiling.profiler import profile

    lengths, folders = parse_lengths(options.prompts), _folders(options)
    if options.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {options.repeats}")
    if options.out and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {options.out}")
    _check_device(options.device, options.backend)
    config = EngineConfig(
        options.model, device=options.device, slots=max(1, len(folders)), max_rank=options.max_rank,
        max_batch_tokens=max(sum(lengths), 1024), max_batch_requests=max(len(lengths), 512), backend=options.backend,
        base_aliases=("*",),
    )  # fmt: skip
    try:
        adapters = [Revisions().reference(path.name, str(path)) for path in folders]
        found = profile(config, adapters, lengths, options.repeats)
    except RankletError as error:
        raise ValueError(error.message) from None
    show(found, open_console())
    if options.out:
        derived = {"floor_ms": found.floor_ms, "launch_bound": found.launch_bound}
        options.out.write_text(json.dumps(dataclasses.asdict(found) | derived, indent=1) + "\n")
    return 0


def _folders(options: argparse.Namespace) -> list[Path]:
    folders = list(options.adapters)
    if options.adapters_dir:
        found = sorted(path.parent for path in options.adapters_dir.glob(f"*/{CONFIG_FILE}"))
        if not found:
            raise ValueError(
                f"--adapters-dir: expected a folder that contains PEFT folders, got {options.adapters_dir}"
            )
        folders += found
    distinct = len(folders) if options.distinct is None else options.distinct
    if not 0 <= distinct <= len(folders):
        raise ValueError(f"--distinct: expected 0 to {len(folders)}, the number of given adapters, got {distinct}")
    return folders[:distinct]


def _check_device(device: str, backend: str) -> None:
    import torch

    if not _DEVICE.fullmatch(device):
        raise ValueError(f"--device: expected cuda, cuda:0, cpu or auto, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: got {device}, but PyTorch sees no GPU; use cpu")
    if backend == "csgmv" and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("--backend: csgmv needs a GPU; use native or auto")


def parse_lengths(groups: list[str]) -> list[int]:
    """Return the tokens of each prompt: `["2x6144", "3x512"]` is two prompts of 6144 tokens and three of 512.

    Raises:
        ValueError: a group is not of the form COUNTxTOKENS.
    """
    lengths: list[int] = []
    for group in groups:
        found = _GROUP.fullmatch(group)
        if not found:
            raise ValueError(f"--prompts: expected COUNTxTOKENS such as 5x6144, got {group!r}")
        lengths += [int(found[2])] * int(found[1])
    return lengths


def show(found: "Profile", console: Console) -> None:
    """Print a profile. The stage with the largest gap is bold."""
    ceilings, shape = found.ceilings, f"{found.tokens} tokens, {found.prompts} prompts, {found.adapters} adapters"
    table = Table(
        title=f"{shape} ({found.backend}), {found.device}",
        caption=f"floors: {ceilings.operations_per_s / 1e12:.1f} TFLOP/s and {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        "just measured with large matrix products and a large copy",
    )
    for column in ("stage", "calls", "ms", "floor", "gap", "bound by", "LoRA adds", "floor", "share"):
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
        console.print(
            f"launched kernel by kernel: {found.launch_ms:.2f} ms of Python, {found.eager_ms:.2f} ms of device"
        )
    if found.launch_bound:
        console.print("launch bound: the device waits for Python, so the stages' times include waiting")
