"""Gradients averaged over several learners.

Learners on CPUs of one machine average through memory that they share: a few microseconds, where
a network's stack takes a millisecond or more. Others average by `torch.distributed`.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, distributed

from dmrl_ray.tasks.activity import WAITING, during

Average: TypeAlias = Callable[[Tensor], Tensor]

PATIENCE_S = 600.0
"""A learner that waits longer for another gives up; the driver does so sooner."""

SPINS = 2_000
"""Polls of the other learners' counters before a waiting learner yields its core."""


def gradient_average(capacity: int, device: torch.device) -> Average:
    """A function that gives the mean of a gradient over all learners.

    Called by every learner of a `torch.distributed` group at the same time, as the average is.

    Args:
        capacity: numbers that a gradient has at most.
        device: of the learners.
    """
    if device.type == "cpu" and platform.machine() == "x86_64":  # whose stores keep their order
        return _attach(capacity) or _over_network
    return _over_network


class SharedMean:
    """The mean over learners of one machine, through a file that lives in memory.

    Each learner has a counter, and writes to two slots in turn: one that is ahead by a step cannot
    overwrite what others still read, as it waits for their counters before the next.

    Args:
        file: as large as `size_of` says, and zero.
        rank, world_size: of this learner, among how many.
        capacity: numbers that a slot has room for.
    """

    def __init__(self, file: int, rank: int, world_size: int, capacity: int) -> None:
        memory = mmap.mmap(file, self.size_of(world_size, capacity))
        self._counters = np.frombuffer(memory, np.int64, world_size)
        slots = np.frombuffer(memory, np.float32, offset=self._counters.nbytes)
        self._slots = slots.reshape(2, world_size, capacity)
        self._rank, self._step = rank, 0

    @staticmethod
    def size_of(world_size: int, capacity: int) -> int:
        """Bytes."""
        return 8 * world_size + 2 * world_size * capacity * 4

    def __call__(self, mine: Tensor) -> Tensor:
        """The mean of all learners' tensors (N,), summed in the order of their ranks.

        Raises:
            TimeoutError: another learner is gone.
        """
        slots = self._slots[self._step % 2, :, : len(mine)]
        slots[self._rank] = mine.numpy()
        self._step += 1
        self._counters[self._rank] = self._step
        self._wait()
        return torch.from_numpy(slots.mean(0))

    def _wait(self) -> None:
        for _ in range(SPINS):
            if not (self._counters < self._step).any():
                return
        with during(WAITING):
            end = time.monotonic() + PATIENCE_S
            while (self._counters < self._step).any():
                time.sleep(50e-6)
                if time.monotonic() > end:
                    raise TimeoutError(f"no gradient from another learner within {PATIENCE_S} s")


def _over_network(mine: Tensor) -> Tensor:
    with during(WAITING):
        distributed.all_reduce(mine)
    return mine / distributed.get_world_size()


def _attach(capacity: int) -> SharedMean | None:
    """Memory that all learners of the group share, or None where they are on several machines."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    size = SharedMean.size_of(world_size, capacity)
    file, paths = -1, [""]
    if rank == 0:
        file, paths[0] = tempfile.mkstemp(prefix="dmrl_ray-", dir=folder)
        os.posix_fallocate(file, 0, size)  # A full disk raises here, instead of a crash later.
    distributed.broadcast_object_list(paths)
    path = Path(paths[0])
    if rank and path.is_file():
        file = os.open(path, os.O_RDWR)
    found = torch.tensor(int(file >= 0 and os.fstat(file).st_size == size))
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    if rank == 0:
        path.unlink()  # Everyone holds it; it ends with the last of them.
    shared = SharedMean(file, rank, world_size, capacity) if found else None
    if file >= 0:
        os.close(file)
    return shared
