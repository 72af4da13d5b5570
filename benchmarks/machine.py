"""Describes the machine of a measurement, and the resource usage of processes (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dmrl_ray.config.machine import usable_cores

TICKS = os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, object]:
    """Returns processor, cores, load average over a minute, and version of PyTorch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    return {
        "cpu": model,
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def family() -> dict[int, float]:
    """Returns CPU seconds of this process and its descendants, by process id."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # The process has ended.
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        # Includes ended children that the process has waited for, which are not listed.
        used[pid] = sum(map(int, fields[11:15])) / TICKS
    found = {os.getpid()}
    while True:
        grown = found | {pid for pid, parent in parents.items() if parent in found}
        if grown == found:
            return {pid: used[pid] for pid in found}
        found = grown


def cpu_seconds() -> float:
    """Returns CPU seconds of this process and its descendants, including Ray's daemons."""
    return sum(family().values())


def busy_seconds() -> float:
    """Returns CPU seconds of all processes since the machine started."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, irq, softirq, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq) / TICKS


def resident_mb(pid: int) -> float:
    """Returns the resident set size of a process, including shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    size = next(line for line in lines if line.startswith("VmRSS"))
    return int(size.split()[1]) / 1024


def command_of(pid: int) -> str:
    """Returns the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
