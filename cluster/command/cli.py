"""`ranklet`: a cluster on this machine, up and down; its adapters and keys; load for it; where its time goes."""

import argparse
import getpass
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from ranklet.cluster.access import keys
from ranklet.cluster.command import adapters, doctor, profile, simulate
from ranklet.cluster.command.bench import command as bench
from ranklet.cluster.command.local_cluster import ClusterError, LocalCluster
from ranklet.cluster.command.processes import notify_systemd
from ranklet.cluster.command.ray_head import auth_environment
from ranklet.cluster.datapath import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `ranklet` command; returns the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.run(asked))
    except (ClusterError, ValueError, OSError) as error:
        print(f"ranklet: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ranklet", description="Many LoRA adapters of one base model, over Ray Serve."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start Ray on this machine, deploy a configuration, wait until it answers")
    up.add_argument("config", type=Path, metavar="CONFIG", help="for instance deploy/local.yaml")
    up.add_argument(
        "--proxy", choices=("haproxy", "serve"), default="haproxy", help="what takes HTTP (default: haproxy)"
    )
    up.add_argument("--port", type=int, help="HTTP port instead of the configuration's; 0 takes a free one")
    up.add_argument("--timeout-s", type=float, default=180.0, help="how long to wait (default: %(default)s)")
    up.set_defaults(run=_up)
    up.add_argument(
        "--foreground", action="store_true", help="stay, and stop Ray at SIGTERM or Ctrl-C; 1 if Ray ends before"
    )
    doctor.add(commands)
    down = commands.add_parser("down", help="stop what `ranklet up` started, and nothing else")
    down.set_defaults(run=_down)
    for command in (up, down):
        command.add_argument(
            "--temp-dir", type=Path, default=_default_temp_dir(), help="Ray's sessions and logs (default: %(default)s)"
        )
    adapters.add(commands)
    keys_parser = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="ACTION")
    new = keys_parser.add_parser("new", help="a new key, and its entry for security.keys_file")
    new.add_argument("name", help="whose it is")
    new.add_argument("--admin", action="store_true", help="may load and unload adapters, and use all of them")
    new.add_argument("--adapters", nargs="+", default=[], metavar="PATTERN", help="names it may use, such as legal-*")
    new.add_argument("--tokens-per-minute", type=int, metavar="N", help="its quota (default: none)")
    new.set_defaults(run=_new_key)
    bench.add(commands)
    profile.add(commands)
    simulate.add(commands)
    tune = commands.add_parser("tune", help="measure a model's kernels on this machine's GPU, once per model and GPU")
    tune.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="where config.json is")
    tune.add_argument("--rank", type=int, default=64, help="the rank of adapters, as max_rank (default: %(default)s)")
    tune.add_argument("--ranks", type=int, nargs="+", default=[], help="more ranks")
    tune.add_argument("--rows", type=int, nargs="+", default=[], help="batches of these many rows only")
    tune.add_argument("--gpu-table", type=Path, metavar="PATH", help="the table (default: the GPU's, with the kernels)")
    tune.add_argument("--no-crossovers", action="store_true", help="do not time the backends against each other")
    tune.set_defaults(run=_tune)
    version = commands.add_parser("version", help="installed versions")
    version.set_defaults(run=_version)
    return parser


def _default_temp_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"ranklet-{getpass.getuser()}"


def _up(asked: argparse.Namespace) -> int:
    cluster = LocalCluster(
        asked.temp_dir,
        proxy=asked.proxy,
        http_port=asked.port,
        report=lambda line: print(f"ranklet: {line}", flush=True),
    )
    if asked.foreground:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
    state = cluster.start(asked.config, asked.timeout_s)
    settings = " ".join(f"{name}={value}" for name, value in auth_environment(asked.temp_dir.absolute()).items())
    print(f"ranklet: logs in {state.temp_dir}/session_latest/logs/serve; Serve's own view of it:")
    print(f"  {settings} serve status -a {state.dashboard}", flush=True)
    return _stay(cluster) if asked.foreground else 0


def _stay(cluster: LocalCluster) -> int:
    """Until a signal, or Ray, ends it."""
    with cluster:
        notify_systemd("READY=1")
        while cluster.is_alive:
            time.sleep(1.0)
    print("ranklet: Ray has ended by itself", file=sys.stderr)
    return 1


def _end(number: int, frame: object) -> None:
    notify_systemd("STOPPING=1")
    raise SystemExit(0)


def _down(asked: argparse.Namespace) -> int:
    cluster = LocalCluster(asked.temp_dir, report=lambda line: print(f"ranklet: {line}", flush=True))
    running = cluster.state
    cluster.stop()
    print(f"ranklet: stopped {running.base_url}")
    return 0


def _new_key(asked: argparse.Namespace) -> int:
    quota = asked.tokens_per_minute
    secret, entry = keys.new_key(asked.name, admin=asked.admin, adapters=tuple(asked.adapters), tokens_per_minute=quota)
    written = yaml.safe_dump([entry.model_dump(mode="json", exclude_none=True)], sort_keys=False)
    print(f"key, shown this once: {secret}")
    print(f"entry for security.keys_file:\n{written}", end="")
    return 0


def _tune(asked: argparse.Namespace) -> int:
    from ranklet.kernels.tuning.tune import tune  # torch and Triton take seconds, which `up` and `down` need not wait
    from ranklet.replicas.model.architecture import read_architecture, read_config

    dims = read_architecture(read_config(asked.model)).module_dims()
    ranks = sorted({asked.rank, *asked.ranks})
    path = tune(dims, ranks, path=asked.gpu_table, rows=asked.rows, crossovers=not asked.no_crossovers)
    print(f"ranklet: wrote {path}")
    return 0


def _version(asked: argparse.Namespace) -> int:
    for name, value in versions().items():
        print(f"{name} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
