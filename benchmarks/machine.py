"""The machine that a measurement is taken on, and what processes use of it (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

TICKS = os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, object]:
    """Processor, cores, load average of the last minute, and PyTorch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def family() -> dict[int, float]:
    """CPU seconds of this process and all that descend from it, by process id."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It ended meanwhile.
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        # Of itself, and of children that it waited for and that are gone from the list.
        used[pid] = sum(map(int, fields[11:15])) / TICKS
    found = {os.getpid()}
    while True:
        grown = found | {pid for pid, parent in parents.items() if parent in found}
        if grown == found:
            return {pid: used[pid] for pid in found}
        found = grown


def cpu_seconds() -> float:
    """CPU time of this process and all that descend from it, Ray's daemons included."""
    return sum(family().values())


def busy_seconds() -> float:
    """CPU time of all processes of the machine since it started."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, irq, softirq, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq) / TICKS


def resident_mb(pid: int) -> float:
    """Memory of a process that is in RAM, what it shares with others included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    size = next(line for line in lines if line.startswith("VmRSS"))
    return int(size.split()[1]) / 1024


def command_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
