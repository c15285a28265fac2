"""`ranklet bench`: its flags follow SGLang's `bench_serving` and vLLM's `bench serve`."""

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
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.cluster.command.console import open_console
from ranklet.cluster.command.json_client import clean_key

_KEY_VARIABLES = ("RANKLET_API_KEY", "OPENAI_API_KEY")
_DESCRIPTION = (
    "Send load to a server with OpenAI's API for embeddings or text (vLLM, SGLang, ranklet and others) and measure the "
    "answers. Output tokens are counted by the server's usage; without it, each frame with text counts as one. What "
    "arrives in one read is one gap, with as many tokens as it has. A role chunk is no text. A stream with an error "
    "event, or without [DONE] at its end, is a failure."
)
_HELP = {
    "base_url": "URL of the server", "endpoint": "path of the API (default: OpenAI's)",
    "api_key": "sent as a bearer token",
    "model": "name of the base model (default: the first of /v1/models that has no parent)",
    "adapters": "names, or quoted patterns of names in /v1/models, such as 'legal-*' (default: only the base model)",
    "adapter_as": "field that names the adapter: model, or lora_path for SGLang",
    "adapter_distribution": "distinct, uniform, skewed, identical or zipf:ALPHA",
    "dataset": "random, or file",
    "path": "file for --dataset file: one text per line, or JSON lines with `text` or `input`, and optionally `model`",
    "input_len": "most tokens in a random prompt", "range_ratio": "length of the shortest prompt / --input-len",
    "length_distribution": "uniform, or lognormal:SIGMA, whose median is the length and whose ends are length * ratio "
    "and length / ratio",
    "vocab": "upper bound of random token ids (default: 10000, or fewer if /v1/models says so)",
    "as_text": "send random words instead of token ids",
    "num_prompts": "number of prompts", "batch_size": "prompts per request",
    "request_rate": "requests per second, Poisson; inf sends all at once",
    "max_concurrency": "most requests or streams in flight", "encoding_format": "base64 or float",
    "seed": "random seed",
    "warmup": "requests before the measurement, to each adapter in turn", "timeout_s": "per request",
    "processes": "number of processes that send (default: depends on the CPU cores)",
}  # fmt: skip
_TEXT_HELP = {
    "chat": "use /v1/chat/completions, with random words", "stream": "ask for whole answers",
    "output_len": "most tokens in an answer", "output_range_ratio": "length of the shortest answer / --output-len",
    "common_prompt_tokens": "tokens that all prompts begin with, before --input-len",
    "ignore_eos": "answers have their full length (an extension of vLLM, SGLang and ranklet)",
    "temperature": "0 is greedy; above 0, each request also has a seed, made from --seed",
    "continuous_usage": "ask for token counts in every frame; costs the client more CPU",
}  # fmt: skip
# types of fields without one
_TYPES: dict[str, Any] = {
    "model": str, "endpoint": str, "path": Path, "max_concurrency": int, "processes": int, "vocab": int,
}  # fmt: skip
_COMPUTED = ("processes", "vocab")  # where no flag sets them


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="send load to a server with OpenAI's API for embeddings or text and measure the answers",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--task", choices=("embed", "text"), default="embed", help="what to ask for (default: %(default)s)"
    )
    for field in dataclasses.fields(BenchPlan):
        if field.name == "text":
            continue
        name, text = flag_name(field.name), _HELP[field.name]
        if field.name == "adapters":
            parser.add_argument(name, nargs="+", default=[], metavar="NAME", help=text)
        elif field.name == "as_text":
            parser.add_argument(name, action="store_true", help=text)
        else:
            default = field.default if field.default is not dataclasses.MISSING and field.name != "vocab" else None
            kind = _TYPES.get(field.name, type(default))
            if default not in (None, ""):
                text += " (default: %(default)s)"
            parser.add_argument(
                name, dest=field.name, type=kind, default=default, metavar=kind.__name__.upper(), help=text
            )
    _add_text_flags(parser.add_argument_group("with --task text"))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers, the plan and the versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot latencies and the rate over time")
    parser.set_defaults(run=_run)


def _add_text_flags(group: Any) -> None:
    """Add the flags of text. Their defaults are None, so that they can be refused for embeddings."""
    for field in dataclasses.fields(TextPlan):
        name, text = _text_flag(field.name), _TEXT_HELP[field.name]
        if isinstance(field.default, bool):
            group.add_argument(
                name, dest=field.name, action="store_const", const=not field.default, default=None, help=text
            )
        else:
            text += f" (default: {field.default})"
            kind = type(field.default)
            group.add_argument(name, dest=field.name, type=kind, metavar=kind.__name__.upper(), help=text)


def _text_flag(field: str) -> str:
    return "--no-stream" if field == "stream" else flag_name(field)


def _text_from_options(options: argparse.Namespace) -> TextPlan | None:
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TextPlan)
        if getattr(options, field.name) is not None
    }
    if options.task == "text":
        return TextPlan(**given)
    if given:
        raise ValueError(f"{_text_flag(next(iter(given)))}: expected only with --task text")
    return None


def _run(options: argparse.Namespace) -> int:
    """Return 0 if every request was answered as asked, else 1."""
    from rich.progress import Progress, TimeElapsedColumn

    from ranklet.cluster.command.bench.run import run_bench
    from ranklet.cluster.command.bench.server import fetch_version
    from ranklet.cluster.command.bench.show import check_plot_path, plot_result, print_result

    plan = _plan_from_options(options)
    _check_folders(options.out, options.plot)
    if options.plot:
        check_plot_path(options.plot)
    console = open_console()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"{plan.num_prompts:,} prompts to {plan.url}", total=None)
        try:
            result = run_bench(plan, lambda done, total: bar.update(task, completed=done, total=total))
        except KeyboardInterrupt:
            raise ValueError("interrupted before the measurement began") from None
    print_result(result, console)
    if options.out:
        content = _describe_run(plan, fetch_version(plan)) | result.to_json()
        options.out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if options.plot:
        plot_result(result, options.plot)
    return int(result.overall.answered < result.planned)


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: expected an existing folder; create {path.parent}")


def _plan_from_options(options: argparse.Namespace) -> BenchPlan:
    from ranklet.cluster.command.bench.server import fetch_vocabulary

    fields = {name: getattr(options, name) for field in dataclasses.fields(BenchPlan) if (name := field.name) != "text"}
    fields["text"] = _text_from_options(options)
    fields["adapters"] = tuple(fields["adapters"])
    if not fields["api_key"]:
        fields["api_key"] = next((os.environ[name] for name in _KEY_VARIABLES if name in os.environ), "")
    fields["api_key"] = clean_key(fields["api_key"]) or ""
    plan = BenchPlan(**{name: value for name, value in fields.items() if name not in _COMPUTED or value is not None})
    if fields["vocab"] is None and plan.dataset == "random" and not plan.as_text:
        return dataclasses.replace(plan, vocab=min(plan.vocab, fetch_vocabulary(plan) or plan.vocab))
    return plan


def _describe_run(plan: BenchPlan, server: Any) -> dict[str, Any]:
    """Return the conditions of a run, without the API key.

    Args:
        server: The server's answer to /version.
    """
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(plan).items()}
    shown["request_rate"] = str(plan.request_rate)  # JSON has no infinity
    shown["text"] = plan.text and vars(plan.text)
    shown["url"] = plan.url
    del shown["api_key"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "client_machine": {
            "cpu_cores": cpu_cores(), "python": platform.python_version(),
            "aiohttp": metadata.version("aiohttp"),
        },
        "server": server, "plan": shown,
    }  # fmt: skip
