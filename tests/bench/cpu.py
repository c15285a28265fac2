"""CPU time of the processes of one cluster, by their part in answering a request. Reads /proc."""

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PARTS = {  # by what the command line contains
    "replicas.process.worker": "engine",
    ":Replica": "actor",
    ":Gateway": "gateway",
    "haproxy -": "haproxy",
}


class PartCpu(NamedTuple):
    """CPU time of the processes of one part.

    Attributes:
        seconds: of all processes together.
        busiest_s: of the process that used most.
    """

    seconds: float
    busiest_s: float


class MachineCpu(NamedTuple):
    """CPU time of the machine.

    Attributes:
        busy_s: of all processes.
        stolen_s: that a virtual machine's host gave to others.
    """

    busy_s: float
    stolen_s: float


CpuTimes = dict[int, tuple[str, float]]  # part and seconds by process id


def cpu_times(root: int) -> CpuTimes:
    """Return the part and the CPU seconds of each process below `root`. Others than those of `_PARTS` are "other"."""
    parents, seconds = {}, {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if fields:
            parents[int(folder.name)] = int(fields[1])
            seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return {pid: (_part(pid), used_s) for pid, used_s in seconds.items() if _is_below(pid, root, parents)}


def machine_cpu() -> MachineCpu:
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = (
        int(ticks) / _TICKS_PER_S for ticks in Path("/proc/stat").read_text().split()[1:9]
    )
    return MachineCpu(user + nice + system + interrupts + soft_interrupts, stolen)


def used(before: CpuTimes, after: CpuTimes) -> dict[str, PartCpu]:
    """Return what each part has used in between."""
    by_part = defaultdict(list)
    for pid, (part, seconds) in after.items():
        by_part[part].append(seconds - before.get(pid, (part, 0.0))[1])
    return {part: PartCpu(sum(each), max(each)) for part, each in by_part.items()}


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root


def _part(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "other"
    return next((part for found, part in _PARTS.items() if found in command), "other")
