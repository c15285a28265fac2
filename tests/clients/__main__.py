"""`python -m tests.clients`: serve SmolLM2 with its adapters as the demo does, and run published clients against it.

Each client runs unchanged in an environment of its own below .clients, at the versions of its pins. The first run
downloads them. Exits with 1 if a check fails. A run of all clients writes tests/bench/results/clients-cpu.json.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ranklet.cluster.command.running_cluster import ClusterError
from tests.assets.smollm import DownloadError
from tests.assets.training.lessons import TRAINED
from tests.bench import report
from tests.clients.clients import CLIENTS, Client
from tests.clients.environments import InstallError, command, prepare, version
from tests.clients.outcome import Outcome, read_report
from tests.cluster.service import serving
from tests.demo.models import ROOT, DemoModel, smollm_model

NUMBERS = ("passed", "failed", "not applicable", "seconds")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")  # writes tools, which SmolLM2's own does not
_CHECKS_S = 600.0
_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # clients read either


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"clients; default: all of {', '.join(_by_name())}")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="FOLDER", help="folder of the result file")
    parser.add_argument("--install-only", action="store_true", help="create the environments and stop")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in _by_name()]
    if unknown:
        parser.error(f"unknown client {', '.join(unknown)}; known: {', '.join(_by_name())}")
    chosen = [_by_name()[name] for name in dict.fromkeys(options.names)] or list(CLIENTS)
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the server on the way out
    try:
        model = smollm_model(ROOT / ".demo" / "smollm", console.print)
        unusable = _install(console, chosen)
        if options.install_only:
            return int(bool(unusable))
        outcomes = run(console, chosen, model, unusable)
    except (ClusterError, DownloadError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    show(console, outcomes)
    if len(chosen) == len(CLIENTS):
        report.write("clients-cpu", [outcome.row() for outcome in outcomes], options.out)
    return int(not all(outcome.is_good for outcome in outcomes))


def run(console: Console, clients: list[Client], model: DemoModel, unusable: dict[str, str]) -> list[Outcome]:
    """Start a server and run the checks of the clients whose environments are usable, one client after the other."""
    content = model.configuration()
    arguments = content["applications"][0]["args"]
    arguments["engine"]["max_model_len"] = 2048  # the checks send longer prompts too
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as with_tools:
        for file in model.model_dir.iterdir():
            (Path(with_tools) / file.name).symlink_to(TEMPLATE if file.name == TEMPLATE.name else file)
        arguments["base"]["model_dir"] = with_tools
        return _check_all(console, clients, model, unusable, content, Path(folder))


def _check_all(
    console: Console, clients: list[Client], model: DemoModel, unusable: dict[str, str], content: dict[str, Any],
    folder: Path,
) -> list[Outcome]:  # fmt: skip
    outcomes = []
    with serving(content, folder) as service:
        for client in clients:
            if client.name in unusable:
                outcomes.append(Outcome(client.name, version(client), error=unusable[client.name]))
                continue
            console.rule(client.name)
            outcomes.append(_check(client, model.model_dir, service.url))
    return outcomes


def show(console: Console, outcomes: list[Outcome]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Clients, unchanged, against ranklet with SmolLM2-135M-Instruct",
    )
    for heading in ("client", "version", *NUMBERS, "refused by name"):
        table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=heading not in NUMBERS)
    for outcome in outcomes:
        row = outcome.row()
        cells = (str(row[heading]) for heading in ("client", "version", *NUMBERS))
        table.add_row(*cells, "\n".join(outcome.refused), style=None if outcome.is_good else "red")
    console.print(table)
    for outcome in outcomes:
        for what, value in outcome.measured:
            console.print(f"{outcome.client}: {what} {value:.1e}", markup=False, highlight=False)
        for line in (*outcome.failed, *([outcome.error] if outcome.error else [])):
            console.print(f"{outcome.client}: {line}", style="red", markup=False, highlight=False)


def _by_name() -> dict[str, Client]:
    return {client.name: client for client in CLIENTS}


def _install(console: Console, clients: list[Client]) -> dict[str, str]:
    """Prepare the environments. Returns what is wrong with those that cannot be made, by client."""
    wrong = {}
    for client in clients:
        with console.status(f"installing {client.name}"):
            try:
                prepare(client)
            except InstallError as error:
                wrong[client.name] = str(error)
    return wrong


def _check(client: Client, model_dir: Path, url: str) -> Outcome:
    client.report.unlink(missing_ok=True)
    variables = dict.fromkeys(_VARIABLES, f"{url}/v1")
    variables |= {"OPENAI_API_KEY": "unused", "RANKLET_MODEL_DIR": str(model_dir), "RANKLET_ADAPTERS_DIR": str(TRAINED)}
    # Nothing may be fetched but the pinned packages.
    variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1"}
    started_s = time.monotonic()
    try:
        done = subprocess.run(command(client), env=_environment() | variables, check=False, timeout=_CHECKS_S)
    except subprocess.TimeoutExpired:
        return Outcome(client.name, version(client), error=f"took more than {_CHECKS_S:.0f} s")
    seconds = time.monotonic() - started_s
    if not client.report.exists():
        return Outcome(client.name, version(client), seconds=seconds, error=f"ended with {done.returncode}")
    return read_report(client.report, client.name, version(client), seconds)


def _environment() -> dict[str, str]:
    """Return the variables of this process without those of Python, which belong to the project's environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


if __name__ == "__main__":
    sys.exit(main())
