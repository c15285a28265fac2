"""`ranklet doctor`: checks whether a machine, and a deployment's file, are ready to serve. Starts nothing."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ranklet.cluster.command.console import open_console, plain
from ranklet.cluster.command.deployment_checks import check_deployment
from ranklet.cluster.command.finding import Finding
from ranklet.cluster.command.machine_checks import check_machine
from ranklet.cluster.command.token_check import check_token

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def add(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check whether this machine can serve, and how to fix what is missing")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="also check this deployment's file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    table = Table("", "subject", "found", "what to do")
    failed = False
    for finding in run_checks(options.config):
        failed |= finding.state == "fail"
        state = Text(finding.state, style=_COLORS[finding.state])
        table.add_row(state, plain(finding.subject), plain(finding.value), plain(finding.remedy))
    open_console().print(table)
    return int(failed)


def run_checks(config: Path | None) -> Iterator[Finding]:
    """Yield all findings. Without a configuration, the model, the adapters and the HTTP port are not checked."""
    yield from check_machine()
    if config is None:
        yield check_token()
    else:
        yield from check_deployment(config)
