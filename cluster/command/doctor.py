"""`ranklet doctor`: checks whether a machine, and a deployment's file, are ready to serve. Starts nothing."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from ranklet.cluster.command.console import plain_lines, print_line
from ranklet.cluster.command.deployment_checks import check_deployment
from ranklet.cluster.command.finding import Finding
from ranklet.cluster.command.machine_checks import check_machine
from ranklet.cluster.command.token_check import check_token

_SUBJECT_WIDTH = 24
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def add(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check whether this machine can serve, and how to fix what is missing")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="also check this deployment's file")
    parser.add_argument(
        "--ray-start", action="store_true",
        help="check what a cluster of `ray start` and `serve deploy` needs, in place of `ranklet up`",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    findings = list(run_checks(options.config, ray_start=options.ray_start))
    width = min(_SUBJECT_WIDTH, max(len(finding.subject) for finding in findings))
    for finding in findings:
        print_line(
            Text(f"{finding.state:<4}", _COLORS[finding.state])
            + plain_lines(f"  {finding.subject:<{width}}  {finding.value}")
        )
        if finding.remedy:
            print_line(f"      {finding.remedy}")
    return int(any(finding.state == "fail" for finding in findings))


def run_checks(config: Path | None, *, ray_start: bool = True) -> Iterator[Finding]:
    """Yield all findings. Without a configuration, the model, the adapters and the HTTP port are not checked.

    Args:
        ray_start: Whether Ray is started by hand. `ranklet up` sets variables, makes a token and finds free ports.
    """
    yield from check_machine(ray_start=ray_start)
    if config is not None:
        yield from check_deployment(config, ray_start=ray_start)
    elif ray_start:
        yield check_token()
