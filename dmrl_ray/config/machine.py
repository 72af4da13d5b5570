"""The cores of this machine that a process may use, which can be fewer than it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Returns the number of cores by affinity and by the quotas of control groups, at least 1.

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _quotas(root) if quota >= 0]
    return max(1, int(min([cores, *quotas])))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that the control groups of this process and those above them grant."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        second = controllers == ""
        if not second and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if second else "cpu")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            yield from _quota(folder, second)


def _quota(folder: Path, second: bool) -> Iterator[float]:
    try:
        if second:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        yield float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # There is none; "max" is no number.
        return
