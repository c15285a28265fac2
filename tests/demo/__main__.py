"""`make demo`: serve a small model and six adapters with Ray Serve and compare the answers with PEFT.

Exits with 1 if an answer differs from the reference.
"""

import argparse
import signal
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

import yaml
from rich.console import Console
from rich.markup import escape

from ranklet.cluster.command.local_cluster import ClusterError, LocalCluster
from tests.assets.cache import is_made, make_once
from tests.demo import show
from tests.demo.client import Question, Vectors, answers, questions, reference

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "local.yaml"
WORST_COSINE = 0.999999


class Progress:
    """Prints lines with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = time.monotonic()

    def __call__(self, line: str) -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._started_s:5.1f} s[/]  {escape(line)}", highlight=False, soft_wrap=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--port", type=int, help="HTTP port; default: that of deploy/local.yaml, or any free one")
    options = parser.parse_args()
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return run(console, port=options.port, keep=options.keep)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except ClusterError as error:
        console.print(f"[red]the cluster did not start:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


def run(console: Console, *, port: int | None, keep: bool) -> int:
    progress = Progress(console)
    if not is_made(ROOT / ".demo"):
        progress("writing a model (Qwen3, 4 layers) and six adapters saved by PEFT into .demo")
    make_once(ROOT / ".demo")
    sent = questions(ROOT / ".demo")
    with ThreadPoolExecutor(1) as pool, LocalCluster(directory=ROOT, http_port=_port(port), report=progress) as cluster:
        expected: Future[Vectors] = pool.submit(reference, ROOT / ".demo" / "model", sent)
        url = cluster.start(CONFIG).base_url
        worst = _compare(console, progress, url, sent, expected)
        if keep:
            console.print("press Ctrl-C to stop")
            with suppress(KeyboardInterrupt):
                signal.pause()
    return 0 if worst >= WORST_COSINE else 1


def _compare(
    console: Console, progress: Progress, url: str, sent: list[Question], expected: "Future[Vectors]"
) -> float:
    progress("requesting embeddings with the openai client")
    rows = answers(url, sent)
    progress("comparing with transformers + PEFT")
    worst = show.table(console, rows, expected.result())
    show.banner(console, url, sent)
    if worst < WORST_COSINE:
        console.print(f"[red]expected every cosine to be at least {WORST_COSINE}, the lowest is {worst:.9f}[/]")
    return worst


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once. A second Ctrl-C must not interrupt the cluster's shutdown."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _port(requested: int | None) -> int | None:
    """Return the requested port, else None for the configured one if it is free, else 0 for any."""
    if requested is not None:
        return requested
    http = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["http_options"]
    with socket.socket() as probe:
        return 0 if probe.connect_ex((http["host"], http["port"])) == 0 else None


if __name__ == "__main__":
    sys.exit(main())
