"""`ranklet bench`: the flags, in the habit of SGLang's `bench_serving` and vLLM's `bench serve`."""

import argparse
import dataclasses
import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ranklet.cluster.command.bench.plan import BenchPlan, cpu_cores, flag_name

_KEY_VARIABLES = ("RANKLET_API_KEY", "OPENAI_API_KEY")
_HELP = {
    "base_url": "the server", "endpoint": "where it takes embeddings", "api_key": "sent as a bearer token",
    "model": "the base's name (default: what /v1/models lists first without a parent)",
    "adapters": "names, or quoted patterns of what /v1/models lists, such as 'legal-*' (default: the base alone)",
    "adapter_as": "the field that names the adapter: model, or lora_path as SGLang has it",
    "adapter_distribution": "distinct, uniform, skewed, identical or zipf:ALPHA",
    "dataset": "random, or file",
    "path": "of --dataset file: a text a line, or JSON lines with `text` or `input`, and perhaps `model`",
    "input_len": "tokens of a random prompt, at most", "range_ratio": "the shortest has this share of --input-len",
    "vocab": "random token ids are below this",
    "as_text": "send random words instead of token ids",
    "num_prompts": "how many in all", "batch_size": "prompts a request",
    "request_rate": "requests a second, Poisson; inf sends all at once",
    "max_concurrency": "requests in flight, at most", "encoding_format": "base64 or float", "seed": "of what is random",
    "warmup": "requests before the clock starts, to each adapter in turn", "timeout_s": "for one request",
    "processes": "that send, so that the client is not the bottleneck (default: as CPU cores allow)",
}  # fmt: skip
_WIDTH = 120  # of tables that go to a file
_KINDS: dict[str, Any] = {"model": str, "path": Path, "max_concurrency": int}


def add(commands: Any) -> None:
    """The subcommand's parser."""
    parser = commands.add_parser(
        "bench", help="send load to a server and measure it (any with OpenAI's embeddings API)"
    )
    for field in dataclasses.fields(BenchPlan):
        name, said = flag_name(field.name), _HELP[field.name]
        if field.name == "adapters":
            parser.add_argument(name, nargs="+", default=[], metavar="NAME", help=said)
        elif field.name == "as_text":
            parser.add_argument(name, action="store_true", help=said)
        else:
            default = field.default if field.default is not dataclasses.MISSING else None
            kind = _KINDS.get(field.name, int if field.name == "processes" else type(default))
            shown = said if default in (None, "") else f"{said} (default: %(default)s)"
            parser.add_argument(
                name, dest=field.name, type=kind, default=default, metavar=kind.__name__.upper(), help=shown
            )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers, the plan and the versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latencies and the rate over time")
    parser.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    """0 if every request was answered with vectors, else 1."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from ranklet.cluster.command.bench.run import run_bench
    from ranklet.cluster.command.bench.server import fetch_version
    from ranklet.cluster.command.bench.show import check_plot_path, plot_result, print_result

    plan = plan_from_args(asked)
    _check_paths(asked.out, asked.plot)
    if asked.plot:
        check_plot_path(asked.plot)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"{plan.num_prompts:,} prompts to {plan.url}", total=None)
        try:
            result = run_bench(plan, lambda done, of: bar.update(task, completed=done, total=of))
        except KeyboardInterrupt:
            raise ValueError("interrupted before anything was measured") from None
    print_result(result, console)
    if asked.out:
        asked.out.write_text(
            json.dumps(describe_run(plan, fetch_version(plan)) | result.to_json(), indent=1, allow_nan=False) + "\n"
        )
    if asked.plot:
        plot_result(result, asked.plot)
    return int(result.overall.answered < result.planned)


def _check_paths(*paths: Path | None) -> None:
    """A run's numbers must not be lost for a folder that is not there."""
    for path in paths:
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: expected its folder to exist; make {path.parent}")


def plan_from_args(asked: argparse.Namespace) -> BenchPlan:
    """The plan that the flags ask for.

    Raises:
        ValueError: as `BenchPlan`.
    """
    given = {field.name: getattr(asked, field.name) for field in dataclasses.fields(BenchPlan)}
    given["adapters"] = tuple(given["adapters"])
    given["api_key"] = given["api_key"] or next((os.environ[name] for name in _KEY_VARIABLES if name in os.environ), "")
    if given["processes"] is None:
        del given["processes"]
    return BenchPlan(**given)


def describe_run(plan: BenchPlan, server: Any) -> dict[str, Any]:
    """What the numbers hold for; the key stays out.

    Args:
        server: what it says of its version.
    """
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(plan).items()}
    asked["request_rate"] = str(plan.request_rate)
    del asked["api_key"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "client_machine": {
            "cpu_cores": cpu_cores(), "python": platform.python_version(),
            "aiohttp": metadata.version("aiohttp"),
        },
        "server": server, "plan": asked,
    }  # fmt: skip
