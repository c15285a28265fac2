"""What the demo prints: tables of vectors and of answers, and commands to try."""

import json

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tests.assets.adapters import LINEAR
from tests.assets.oracle import cosine
from tests.demo.chat import ChatAnswer
from tests.demo.client import EmbeddedTexts, Row
from tests.demo.models import DemoModel
from tests.demo.reference import Vectors

NUMBERS = {"rank", "1st ms", "ms", "tok/s", "equal*"}


def vectors(console: Console, rows: list[Row], expected: Vectors) -> float:
    """Print a line for each model. Returns the lowest cosine."""
    shown = _table(
        "Embeddings: one text per request; the first may load the adapter",
        "* lowest cosine of six texts to transformers + PEFT\n",
    )
    for heading in ("model", "rank", "targets", "tier", "1st ms", "ms", "cosine*"):
        _column(shown, heading, wraps=heading == "targets")
    lowest = []
    for row in rows:
        pairs = zip(row.vectors, expected[row.sent.model], strict=True)
        close = float(np.min([cosine(got, right) for got, right in pairs]))  # NaN if any is; `min` may hide it
        lowest.append(close)
        times = (f"{seconds * 1000:.1f}" for seconds in (row.first_s, row.then_s))
        shown.add_row(*_described(row.sent), ", ".join(row.tiers) or "-", *times, f"{close:.9f}")
    console.print(shown)
    return float(np.min(lowest))


def answers(question: str, answers: list[ChatAnswer]) -> Table:
    """Return the table of answers as they are now."""
    shown = _table(f"Streamed at once: {question}", "* tokens that transformers + PEFT choose too, of all tokens\n")
    shown.expand = True  # else it widens while the answers grow
    for heading in ("model", "1st ms", "tok/s", "equal*", "answer"):
        _column(shown, heading, wraps=heading == "answer")
    for answer in answers:
        first = "" if answer.first_s is None else f"{answer.first_s * 1000:.0f}"
        rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}"
        equal = "" if answer.right is None else f"{answer.right}/{len(answer.tokens)}"
        text = answer.text + (" ..." if answer.text and answer.finish_reason != "stop" else "")
        shown.add_row(answer.model, first, rate, equal, Text(text))
    return shown


def commands(console: Console, url: str, served: DemoModel) -> None:
    """Print what a user may do with the running server."""
    adapter = served.adapters[-1].name
    as_json = "-H 'content-type: application/json'"
    bodies: dict[str, tuple[str, dict[str, object]]] = {}
    if served.question is not None:
        messages = [{"role": "user", "content": served.question}]
        body = {"model": adapter, "stream": True, "messages": messages}
        bodies["a streamed answer"] = "chat/completions", body
    bodies["an embedding"] = "embeddings", {"model": adapter, "input": "Notice must be given in writing."}
    for what, (path, body) in bodies.items():
        _line(console, f"[b]{what}[/]")
        _line(console, escape(f"curl -sN {url}/v1/{path} {as_json} -d '{json.dumps(body)}'"))
    panel = '; its panel "Try it" streams an answer' if served.question is not None else ""
    _line(console, f"[b]the status page[/] {url}/{panel}")
    _line(console, f"[b]models[/] {', '.join(served.names)}")


def _line(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _table(title: str, note: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, caption=note, caption_justify="left", caption_style=""
    )


def _column(table: Table, heading: str, *, wraps: bool) -> None:
    table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=not wraps)


def _described(sent: EmbeddedTexts) -> tuple[str, str, str]:
    spec = sent.adapter
    if spec is None:
        return sent.model, "-", "-"
    modules = (target.removesuffix("_proj") for target in spec.targets if target != "embed_tokens")
    targets = "linear" if spec.targets == LINEAR else " ".join(modules)
    return sent.model, str(spec.rank), f"{targets}{spec.note and f', {spec.note}'}"
