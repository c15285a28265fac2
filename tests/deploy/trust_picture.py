"""Draws deploy/trust.png: who reaches what, and the three trust boundaries of deploy/SECURITY.md.

usage: python -m tests.deploy.trust_picture [--out deploy/trust.png]
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from tests.deploy.prometheus import DEPLOY

_INK, _FAINT, _BOUNDARY, _INSIDE = "#24292f", "#8c959f", "#cf222e", "#f6f8fa"


class Box(NamedTuple):
    """A box with a title and a smaller text below it."""

    x: float
    y: float
    width: float
    height: float
    title: str
    text: str = ""


ACTORS = (
    Box(0, 8.2, 3.4, 1.3, "anyone", "no key"),
    Box(0, 6.5, 3.4, 1.3, "holders of keys", "scoped, with quotas; admins"),
    Box(0, 3.7, 3.4, 1.3, "operators", "hold Ray's token, or own the node"),
    Box(0, 0.9, 3.4, 1.3, "authors of adapters", "folders, object stores, hubs"),
)
PARTS = (
    Box(5.6, 7.0, 2.6, 2.0, "HAProxy", "times, connections\nof one address"),
    Box(9.2, 7.0, 3.2, 2.0, "Gateway", "keys, rights, quotas,\nsizes, turns, Host, Origin"),
    Box(13.4, 7.0, 2.6, 2.0, "Replica", "takes calls of\ngateways only"),
    Box(17.0, 7.0, 2.6, 2.0, "Engine", "a process that\nmay be killed"),
    Box(9.2, 3.7, 6.8, 1.5, "Ray", "GCS, raylet, dashboard, gRPC: they run the code that they get"),
    Box(9.2, 0.6, 6.8, 1.9, "Checks of files", "links, sizes, JSON, headers, tensors; patterns and\ntokenizers "
        "in processes with limits; threads by mount, host"),
)  # fmt: skip
# Ways of data: from, to.
WAYS = (
    ((3.4, 8.85), (5.6, 8.3)), ((3.4, 7.15), (5.6, 7.7)), ((8.2, 8.0), (9.2, 8.0)), ((12.4, 8.0), (13.4, 8.0)),
    ((16.0, 8.0), (17.0, 8.0)), ((3.4, 4.4), (9.2, 4.4)), ((10.8, 5.2), (10.8, 7.0)), ((14.7, 5.2), (14.7, 7.0)),
    ((3.4, 1.55), (9.2, 1.55)),
)  # fmt: skip
# Lines across the ways: x, y from and to, where its name stands, the name.
BOUNDARIES = (
    (4.4, 6.3, 9.6, 9.75, "1  HTTP port"),
    (4.4, 3.4, 5.4, 5.55, "2  Ray's ports: token"),
    (4.4, 0.4, 2.6, 2.75, "3  adapters' files"),
)


def draw(out: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 5.6))
    axes.set(xlim=(-0.2, 20.2), ylim=(0, 10.4))
    axes.set_axis_off()
    axes.add_patch(FancyBboxPatch((5.2, 0.3), 14.8, 9.2, "round,pad=0.1", facecolor="none", edgecolor=_FAINT, ls=":"))
    axes.text(20.0, 9.75, "nodes, trusted network", fontsize=8, color=_FAINT, ha="right")
    for box in (*ACTORS, *PARTS):
        _box(axes, box, "white" if box in ACTORS else _INSIDE)
    for start, end in WAYS:
        _way(axes, start, end)
    axes.plot((16.0, 18.3, 18.3), (1.55, 1.55, 6.6), color=_INK, linewidth=1.2)
    _way(axes, (18.3, 6.5), (18.3, 7.0))
    axes.text(18.45, 4.2, "verified\ntensors", fontsize=8, color=_INK)
    for x, low, high, above, name in BOUNDARIES:
        axes.plot((x, x), (low, high), color=_BOUNDARY, linewidth=2.2, linestyle=(0, (4, 2)))
        axes.text(x + 0.5, above, name, fontsize=9, color=_BOUNDARY, fontweight="bold", ha="right")
    figure.tight_layout()
    figure.savefig(out, dpi=100, facecolor="white")


def _box(axes: Axes, box: Box, color: str) -> None:
    corner, middle = (box.x, box.y), box.x + box.width / 2
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, "round,pad=0", facecolor=color, edgecolor=_INK))
    axes.text(
        middle, box.y + box.height - 0.45, box.title, fontsize=10, color=_INK, ha="center", va="center", weight="bold"
    )
    axes.text(middle, box.y + (box.height - 0.7) / 2, box.text, fontsize=7.5, color=_INK, ha="center", va="center")


def _way(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": _INK, "linewidth": 1.2})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEPLOY / "trust.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
