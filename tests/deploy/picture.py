"""Plots the Grafana board's panels to deploy/board.png, with data of a real Prometheus and a small cluster under load.

The queries are the board's. On a machine without a GPU the numbers are small: the picture shows what the board
contains, not ranklet's speed.

usage: python -m tests.deploy.picture [--seconds 150] [--out deploy/board.png]
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter
from rich.console import Console
from rich.progress import track

from deploy.grafana import board
from tests.assets.broken import BROKEN
from tests.assets.cache import make_once
from tests.cluster.service import BASE, Service, own_configuration, serving
from tests.deploy.prometheus import DEPLOY, Prometheus, scraping

Line = tuple[str, list[float], list[float]]
_COLUMNS = 3
_MAX_SERIES = 10
_MODELS = (BASE, "legal-v2", "medical", "support-rs", "finance-mlp", "code-mixed", "catalog-embed")
_INK, _PAPER, _GRID = "#d8d9da", "#181b1f", "#2c3235"


def send_requests(service: Service, stop: Event, turn: int, start_s: float, seconds: float) -> None:
    """Request all adapters in turn; in the middle third of the time, mostly one adapter. Some requests are invalid.

    One third of the requests are for streamed texts.
    """
    for number in itertools.count(turn):
        if stop.is_set():
            return
        crowded = seconds / 3 < time.monotonic() - start_s < seconds * 2 / 3
        model = "medical" if crowded and number % 4 else _MODELS[number % len(_MODELS)]
        if number % 40 == 0:
            model = ("nobody", "broken")[number % 80 == 0]
        text = f"text {number} about one thing and another"
        if number % 3:
            service.post(model, [text] * (1 + number % 6))
        else:
            limits = {"max_tokens": 8 + number % 60, "stream": True}
            prompt = f"{'one thing or another, ' * 40} {text}"
            service.http.post("/v1/completions", json={"model": model, "prompt": prompt, **limits})


def series(prometheus: Prometheus, panel: board.Panel, seconds: float) -> list[Line]:
    """Return the lines of a panel, each with its legend, times and values."""
    lines = []
    for legend, expr in panel.exprs.items():
        for found in prometheus.query_range(expr.replace("$__rate_interval", "10s"), seconds):
            text = legend
            for name, value in found["metric"].items():
                text = text.replace(f"{{{{{name}}}}}", value)
            points = [(float(at), float(value)) for at, value in found["values"] if value not in ("NaN", "+Inf")]
            lines.append((text, [at for at, _ in points], [value for _, value in points]))
    return lines


def draw(prometheus: Prometheus, seconds: float, out: Path) -> None:
    rows = [(title, panels[i : i + _COLUMNS]) for title, panels in board.ROWS.items() for i in range(0, len(panels), 3)]
    style: dict[Any, Any] = {
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 7,
        "axes.facecolor": _PAPER, "figure.facecolor": "#111217", "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, grid = plt.subplots(len(rows), _COLUMNS, figsize=(14, 2.1 * len(rows)), squeeze=False)
        start_s = time.time() - seconds
        titled = set[str]()
        for (title, panels), axes in zip(rows, grid, strict=True):
            if title not in titled:
                axes[0].text(0, 1.22, title, transform=axes[0].transAxes, fontsize=11, fontweight="bold")
                titled.add(title)
            for panel, ax in itertools.zip_longest(panels, axes):
                if panel is None:
                    ax.set_visible(False)
                else:
                    _plot_panel(ax, panel, series(prometheus, panel, seconds), start_s, seconds)
        figure.tight_layout()
        figure.savefig(out, dpi=90)


def _plot_panel(ax: Axes, panel: board.Panel, lines: list[Line], start_s: float, seconds: float) -> None:
    if not lines:
        raise RuntimeError(f"{panel.title}: no data")
    for text, at, values in sorted(lines, key=lambda line: -max(line[2], default=0.0))[:_MAX_SERIES]:
        ax.plot([each - start_s for each in at], values, linewidth=0.9, label=text)
    ax.set_title(panel.title, loc="left", fontsize=8)
    ax.set_xlim(0, seconds)
    ax.set_ylim(0, (max((max(values, default=0.0) for _, _, values in lines), default=0.0) or 1.0) * 1.3)
    ax.grid(linewidth=0.5)
    units: dict[str, Any] = {
        "percentunit": PercentFormatter(1.0, decimals=0), "s": EngFormatter("s"), "bytes": EngFormatter("B"),
    }  # fmt: skip
    ax.yaxis.set_major_formatter(units.get(panel.unit, EngFormatter()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    ax.legend(fontsize=5, frameon=False, ncol=2, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=DEPLOY / "board.png")
    options = parser.parse_args()
    assets = make_once(Path(".demo"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        content = own_configuration(assets / "model", assets / "adapters", folder)
        BROKEN["nan"].make(assets / "model", folder / "adapters" / "broken")
        content["applications"][0]["args"]["engine"] |= {"slots": 2, "kv_cache_bytes": 1 << 24}
        with serving(content, folder) as service, scraping(service.url, folder) as prometheus:
            service.deploy({"tokens_per_minute": {"support-*": 6000}})
            stop, start_s = Event(), time.monotonic()
            loading = [
                Thread(target=send_requests, args=(service, stop, turn, start_s, options.seconds)) for turn in range(5)
            ]
            for each in loading:
                each.start()
            for _ in track(range(int(options.seconds)), "under load", console=Console(stderr=True)):
                time.sleep(1)
            draw(prometheus, options.seconds, options.out)
            stop.set()
            for each in loading:
                each.join()
    Console().print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
