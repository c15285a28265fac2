"""The demo's table and banner."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from tests.assets.adapters import ATTENTION, LINEAR, MLP
from tests.assets.oracle import cosine
from tests.demo.client import BASE_MODEL, Question, Row, Vectors

HEADINGS = ("model", "rank", "targets", "tier", "1st ms", "ms", "cosine*")
NUMBERS = {"rank", "1st ms", "ms"}
GROUPS = {LINEAR: "linear", ATTENTION: "q k v o", MLP: "gate up down", (*ATTENTION, "embed_tokens"): "q k v o"}


def table(console: Console, rows: list[Row], expected: Vectors) -> float:
    """Print a line for each model. Returns the lowest cosine."""
    shown = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="One text per request; the first may load the adapter"
    )
    for heading in HEADINGS:
        shown.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=heading != "targets")
    worst = 1.0
    for row in rows:
        close = min(cosine(got, right) for got, right in zip(row.vectors, expected[row.question.model], strict=True))
        worst = min(worst, close)
        times = (f"{seconds * 1000:.1f}" for seconds in (row.first_s, row.then_s))
        shown.add_row(*_described(row.question), ", ".join(row.tiers) or "-", *times, f"{close:.9f}")
    console.print(shown)
    console.print("* lowest cosine of six texts to transformers + PEFT\n", highlight=False)
    return worst


def _described(question: Question) -> tuple[str, str, str]:
    spec = question.adapter
    if spec is None:
        return question.model, "-", "-"
    return question.model, str(spec.rank), f"{GROUPS[spec.targets]}{spec.note and f', {spec.note}'}"


def banner(console: Console, url: str, sent: list[Question]) -> None:
    adapters = [question.model for question in sent if question.adapter]
    lines = Table.grid(padding=(0, 2))
    for name, value in (("URL", f"{url}/v1"), ("base", BASE_MODEL), ("adapters", ", ".join(adapters))):
        lines.add_row(f"[b]{name}[/]", value)
    console.print(Panel(lines, title="ranklet", expand=False))
    body = f'{{"model": "{adapters[0]}", "input": "Notice must be given in writing."}}'
    command = f"curl {url}/v1/embeddings -H 'content-type: application/json' -d '{body}'"
    console.print(command, highlight=False, soft_wrap=True, markup=False)
