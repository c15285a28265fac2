"""Write tests/bench/results/README.md: one table for each result file."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import RESULTS
from tests.bench.tables import TABLES, ResultTable

HEAD = """# Benchmark results

Unless a section or its command says otherwise, the numbers come from one NVIDIA H200, the shapes of
Qwen3-Embedding-0.6B, random bf16 weights, and rank-64 adapters on q, k, v and o, where consecutive requests use
different adapters. Each result file also holds the hardware, the versions and further columns. Commands recorded before
2026-11-26 lack the quotes around arguments with spaces. `python -m tests.bench.page` writes this page from the files.
"""


def page(results: Path = RESULTS) -> str:
    others = [f"- [{path.name}]({path.name})" for path in sorted((*results.glob("*.png"), *results.glob("*.log")))]
    sections = (line for table in TABLES for line in _section(results, table))
    grid = "- [kernels-h200-grid.json](kernels-h200-grid.json): times of each LoRA backend over a grid of batches"
    return "\n".join([HEAD, *sections, "## Pictures and other files\n", grid, *others, ""])


def _section(results: Path, table: ResultTable) -> Iterator[str]:
    content = json.loads((results / f"{table.file}.json").read_text())
    made = content["environment"]
    command = re.sub(r"^python (\w+)\.py", r"python -m tests.bench.\1", made["command"])
    yield f"## {table.title}\n"
    yield f"[{table.file}.json]({table.file}.json), {made['date']}: `{command}`\n"
    if table.note:
        yield f"{table.note}\n"
    yield _line(heading for heading, _ in table.columns.values())
    yield "|" + "---|" * len(table.columns)
    for row in content["rows"]:
        if not table.without(row):
            yield _line(show(row[name]) for name, (_, show) in table.columns.items())
    yield ""


def _line(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser("python -m tests.bench.page", description=__doc__).parse_args()
    (RESULTS / "README.md").write_text(page())


if __name__ == "__main__":
    main()
