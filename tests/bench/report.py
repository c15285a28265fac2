"""Result files of benchmarks: rows, command, hardware, versions and date."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "peft", "ray", "nvidia-cudnn-frontend")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parser(description: str | None, name: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of one benchmark's options.

    Args:
        name: default of --name; None for a benchmark that names its result files itself.
    """
    made = argparse.ArgumentParser(
        f"python -m tests.bench.{Path(sys.argv[0]).stem}", description=description, formatter_class=_HelpFormatter
    )
    made.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder for the result files")
    if name is not None:
        made.add_argument("--name", default=name, help="name of the result file, without .json")
    return made


def environment() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": _command(),
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _command() -> str:
    """Return the command line without folders, which differ between machines."""
    words = sys.argv[1:]
    for option in {"--out", "--keep"}.intersection(words):
        at = words.index(option)
        del words[at : at + 2]
    running = sys.modules["__main__"].__spec__  # None unless the program was started with -m
    module = running.name.removesuffix(".__main__") if running else f"tests.bench.{Path(sys.argv[0]).stem}"
    return shlex.join(["python", "-m", module, *words])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def write(name: str, rows: list[dict[str, Any]], out: Path = RESULTS) -> Path:
    """Write `rows` with their environment to `out/name.json`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def save(name: str, rows: list[dict[str, Any]], out: Path = RESULTS) -> Path:
    """Write `rows` with their environment to `out/name.json` and print them as a table.

    Raises:
        ValueError: there are no rows, for example because the options select none.
    """
    if not rows:
        raise ValueError(f"{name}: nothing was measured")
    path = write(name, rows, out)
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    return path
