"""The `ranklet` command: a local cluster, adapters, keys, load tests, profiles and kernel tuning."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ranklet.cluster.access import keys
from ranklet.cluster.command import adapters, doctor, profile, simulate, up
from ranklet.cluster.command.bench import command as bench
from ranklet.cluster.command.console import plain_lines
from ranklet.cluster.command.running_cluster import ClusterError
from ranklet.cluster.datapath import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `ranklet` command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ClusterError, ValueError, OSError) as error:
        print(f"ranklet: {plain_lines(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ranklet", description="Serve many LoRA adapters of one base model, over Ray Serve."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up.add(commands)
    doctor.add(commands)
    adapters.add(commands)
    _add_keys(commands)
    bench.add(commands)
    profile.add(commands)
    simulate.add(commands)
    _add_tune(commands)
    commands.add_parser("version", help="print installed versions").set_defaults(run=_version)
    return parser


def _add_keys(commands: Any) -> None:
    actions = commands.add_parser("keys", help="create API keys").add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser("new", help="print a new key, and its entry for security.keys_file")
    new.add_argument("name", help="the key's owner")
    new.add_argument("--admin", action="store_true", help="allow loading, unloading and using all adapters")
    new.add_argument("--adapters", nargs="+", default=[], metavar="PATTERN", help="allowed names, such as legal-*")
    new.add_argument("--tokens-per-minute", type=int, metavar="N", help="quota (default: none)")
    new.set_defaults(run=_new_key)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="tune the kernels for a model on this machine's GPU, once per GPU type")
    tune.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder with config.json")
    tune.add_argument("--rank", type=int, default=64, help="rank of the adapters, as max_rank (default: %(default)s)")
    tune.add_argument("--ranks", type=int, nargs="+", default=[], help="further ranks")
    tune.add_argument("--rows", type=int, nargs="+", default=[], help="tune only batches of these numbers of rows")
    tune.add_argument("--gpu-table", type=Path, metavar="PATH", help="output file (default: the kernels' own table)")
    tune.add_argument("--no-crossovers", action="store_true", help="do not compare the backends' times")
    tune.set_defaults(run=_tune)


def _new_key(options: argparse.Namespace) -> int:
    secret, entry = keys.new_key(
        options.name, admin=options.admin, adapters=tuple(options.adapters), tokens_per_minute=options.tokens_per_minute
    )
    entries = yaml.safe_dump([entry.model_dump(mode="json", exclude_none=True)], sort_keys=False)
    print(f"key, shown only once: {secret}")
    print(f"entry for security.keys_file:\n{entries}", end="")
    return 0


def _tune(options: argparse.Namespace) -> int:
    # torch and Triton take seconds to import
    from ranklet.kernels.tuning.tune import tune
    from ranklet.replicas.model.architecture import read_architecture, read_config

    dims = read_architecture(read_config(options.model)).module_dims()
    ranks = sorted({options.rank, *options.ranks})
    path = tune(dims, ranks, path=options.gpu_table, rows=options.rows, crossovers=not options.no_crossovers)
    print(f"ranklet: wrote {path}")
    return 0


def _version(options: argparse.Namespace) -> int:
    for name, value in versions().items():
        print(f"{name} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
