"""`ranklet adapters convert`: makes an adapter folder that can be served of one that is stored otherwise."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ranklet.cluster.command.console import print_line
from ranklet.replicas.errors import RankletError

_MAX_RANK = 1024


def add_convert(actions: Any) -> None:
    parser = actions.add_parser(
        "convert",
        help="write a folder that can be served, from one with pickled, sharded or otherwise named weights, with "
        "modules of Megatron, with an initialisation such as PiSSA, or with LoHa or LoKr",
    )
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to create")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="folder of the base model; for PiSSA, OLoRA and Megatron"
    )
    parser.add_argument(
        "--initial", type=Path, metavar="FOLDER", help="the adapter as it was before its training; for PiSSA and so on"
    )
    parser.add_argument("--rank", type=int, default=64, help="rank that replaces LoHa or LoKr (default: %(default)s)")
    parser.add_argument(
        "--max-error", type=float, default=0.01, metavar="PART",
        help="largest error of LoHa or LoKr, relative to a module's change (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from ranklet.replicas.conversion.convert import Conversion  # imports torch, which takes seconds

    if not 1 <= options.rank <= _MAX_RANK:
        raise ValueError(f"--rank: expected 1 to {_MAX_RANK}, got {options.rank}")
    if not options.max_error >= 0:
        raise ValueError(f"--max-error: expected a number of at least 0, got {options.max_error}")
    progress = partial(track, description="modules", console=Console(stderr=True), transient=True)
    try:
        notes = Conversion(
            options.source, options.target, options.model, options.initial, options.rank, options.max_error, progress
        ).run()
    except RankletError as error:
        raise ValueError(error.message) from error
    for note in notes:
        print_line(f"{options.source.resolve().name}: {note}")
    print_line(f"ranklet: wrote {options.target}; check it with `ranklet adapters verify {options.target} --model ...`")
    return 0
