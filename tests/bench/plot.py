"""Draw the grid of `tests.bench.grid`: the fastest backend for each batch, and where dispatch chooses another."""

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {"native": "#7fb2d9", "csgmv": "#f2b56b", "merged": "#8cc79a"}


def draw(result: Path) -> Path | None:
    """Write RESULT.png beside RESULT.json. Returns None where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no picture: matplotlib is missing (pip install matplotlib)")
        return None
    mpl.use("Agg")
    from matplotlib import pyplot

    content = json.loads(result.read_text())
    rows: list[dict[str, Any]] = content["rows"]
    ranks = sorted({row["rank"] for row in rows})
    across = min(2, len(ranks))
    down = -(-len(ranks) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(8 * across, 5 * down), squeeze=False, layout="constrained")
    for panel in panels.flat[len(ranks) :]:
        panel.remove()
    for panel, rank in zip(panels.flat, ranks, strict=False):
        _panel(panel, [row for row in rows if row["rank"] == rank])
        panel.set_title(f"rank {rank}")
    known = [_square(0, 0, color=colour) for colour in COLOURS.values()]
    figure.legend(known, list(COLOURS), loc="outside lower center", ncols=len(COLOURS))
    where = ", ".join(content["environment"]["gpus"]) or "CPU"
    figure.suptitle(f"Fastest backend and its time in ms; below, how much slower dispatch's choice is ({where})")
    path = result.with_suffix(".png")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _panel(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Draw one rank. A red frame marks a choice more than 5 % slower than the best."""
    across, up = sorted({row["rows"] for row in rows}), sorted({row["adapters"] for row in rows})
    for row in rows:
        x, y, behind = across.index(row["rows"]), up.index(row["adapters"]), row["behind_percent"]
        late = behind > 5
        colour, edge = COLOURS[row["best"]], "#c00000" if late else "white"
        panel.add_patch(_square(x, y, facecolor=colour, edgecolor=edge, linewidth=2, zorder=2 if late else 1))
        chosen = f"{behind:.0f} %" if row["pick"] == row["best"] else f"{row['pick']} +{behind:.0f} %"
        panel.text(x, y, f"{row[row['best'] + '_ms']:.3g}\n{chosen}", ha="center", va="center", fontsize=8, zorder=3)
    panel.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(up) - 0.5), xlabel="rows of the batch", ylabel="adapters")
    panel.set_xticks(range(len(across)), [f"{value:,}" for value in across])
    panel.set_yticks(range(len(up)), [str(value) for value in up])


def _square(x: int, y: int, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, **style)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.plot", description=__doc__)
    parser.add_argument("result", type=Path, help="result file of the grid")
    print(draw(parser.parse_args().result))


if __name__ == "__main__":
    main()
