"""Compare runs of the same benchmarks before and after a change, on the same machine.

Files of one benchmark that differ only in a trailing -1, -2, ... are repeated runs of it. Their medians are compared.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import report

# By benchmark: the columns that name a row, and the measured ones with whether larger is better.
COLUMNS: dict[str, tuple[tuple[str, ...], dict[str, bool]]] = {
    "engine": (("prompts", "adapters"), {"tokens_per_s": True}),
    "alone": (("prompt tokens", "adapters"), {"p50_ms": False}),
    "http": (("work",), {"tokens_per_s": True, "p50_ms": False}),
    "policy": (("replicas", "adapters"), {"choose_p50_us": False}),
    "generate": (("shapes", "work", "adapters"), {"tokens_per_s": True, "step_ms": False}),
    "loads": (("beside", "tier"), {"p50_ms": False}),
}

Runs = dict[tuple[str, str, str], list[float]]  # by benchmark, work and measured column


def read(folder: Path) -> Runs:
    found: Runs = {}
    for path in sorted(folder.glob("*.json")):
        name = re.sub(r"-\d+$", "", path.stem)
        if name not in COLUMNS:
            continue
        labels, measured = COLUMNS[name]
        for row in json.loads(path.read_text())["rows"]:
            work = ", ".join(f"{label} {row[label]}" for label in labels)
            for column in measured:
                found.setdefault((name, work, column), []).append(row[column])
    return found


def compare(before: Runs, after: Runs) -> Iterator[dict[str, Any]]:
    for key, old in before.items():
        if key not in after:
            continue
        (benchmark, work, column), new = key, after[key]
        larger_is_better = COLUMNS[benchmark][1][column]
        ratio = median(new) / median(old)
        yield {
            "benchmark": benchmark, "work": work, "measured": column, "before": median(old), "after": median(new),
            "gain": ratio if larger_is_better else 1 / ratio,
            "runs before": _joined(old), "runs after": _joined(new),
        }  # fmt: skip


def _joined(runs: list[float]) -> str:
    return " / ".join(f"{run:.4g}" for run in sorted(runs))


def main() -> None:
    parser = report.parser(__doc__, "compare-h200")
    parser.add_argument("before", type=Path, help="folder of result files")
    parser.add_argument("after", type=Path, help="folder of result files")
    options = parser.parse_args()
    report.save(options.name, list(compare(read(options.before), read(options.after))), options.out)


if __name__ == "__main__":
    main()
