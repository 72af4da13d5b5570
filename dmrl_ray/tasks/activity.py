"""The activity of this process, in memory that others can read without its help.

A process that sleeps, computes or holds the interpreter's lock cannot answer. So it notes what it
does in an anonymous file of memory, which whoever may read ``/proc/PID/fd`` finds there, and which
ends with the last process that holds it. A note costs the reading of the clock and two stores.

    environment calls   sampler, `faults.answer_of`: all environments together
    single ones         families that step in a loop name the environment, its task and seed
    anything else       idle, computing, or waiting for other processes
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic

import numpy as np

IDLE, WAITING, COMPUTING, RESET, STEP = range(5)

ACTIVITIES = (
    "idle",
    "waiting",  # for data, or for another process
    "computing",  # the policy, or anything else outside environments
    "reset",
    "step",
    "make_vec",
    "set_tasks",
    "sample",
    "reference",
    "get_state",
    "set_state",
    "belief",
    "expert_action",
    "best_action",
    "__init__",
    "another method",
)
"""By their numbers; from `RESET` on they are calls of the task family and its environments."""

CODES = {name: code for code, name in enumerate(ACTIVITIES) if code >= RESET}

MAX_ENVS = 4096
"""Single environments whose tasks and seeds are told; those of others stay unknown."""

_NAME = "dmrl_ray-activity"
_WHAT, _SINCE, _ENV, _THREAD, _TASK = range(5)
_HEADER_BYTES = 64
_SIZE = _HEADER_BYTES + 2 * 8 * MAX_ENVS


@dataclass(frozen=True)
class Doing:
    """The activity of a process.

    Attributes:
        what: one of `ACTIVITIES`.
        since: of `time.monotonic`, on that machine.
        in_environment: it is a call of the task family or of its environments.
        env: the environment that is called; None is all of them.
        task: of that environment, or of the first of all; "" is unknown.
        seed: with which it was reset, where environments have seeds of their own.
        thread: that does it.
    """

    what: str
    since: float
    in_environment: bool
    env: int | None
    task: str
    seed: int | None
    thread: int

    def __str__(self) -> str:
        if not self.in_environment:
            return self.what
        task = f"task {self.task}" if self.task else ""
        seed = f"seed {self.seed}" if self.seed is not None else ""
        if self.env is not None:
            parts = f"{self.what} of environment {self.env}", task, seed
        elif CODES[self.what] <= STEP:
            first = f"the first of them on {task}" if task else ""
            parts = f"{self.what} of all environments", first, ""
        else:
            parts = self.what, "", ""
        return ", ".join(part for part in parts if part)


class _Memory:
    """The layout: a header of numbers, then task and seed of each single environment."""

    def __init__(self, file: int) -> None:
        memory = mmap.mmap(file, _SIZE)
        self.head = memoryview(memory)[:_HEADER_BYTES].cast("d")
        self.first_task = np.frombuffer(memory, np.uint64, 1, 8 * _TASK)
        self.tasks = np.frombuffer(memory, np.uint64, MAX_ENVS, _HEADER_BYTES)
        self.seeds = np.frombuffer(memory, np.int64, MAX_ENVS, _HEADER_BYTES + 8 * MAX_ENVS)


class Activity(_Memory):
    """The notes of this process; `mine` gives them.

    Attributes:
        owner: of the single environments whose tasks and seeds stand there.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create(f"{_NAME}-{os.getpid()}")
        os.ftruncate(self._file, _SIZE)
        super().__init__(self._file)
        self.owner: object = None
        self.head[_ENV] = -1

    @property
    def what(self) -> int:
        """The number of what it is doing."""
        return int(self.head[_WHAT])

    def begin(self, what: int) -> float:
        """Note what begins, and return the time, of `time.monotonic`."""
        head, now = self.head, monotonic()
        head[_ENV] = -1
        head[_SINCE] = now
        head[_WHAT] = what
        return now

    def first(self, task: str) -> None:
        """Note the task of the first of environments that are stepped together."""
        self.first_task[0] = _number(task)

    def turn(self, owner: object, tasks: Sequence[str], seeds: Sequence[int]) -> None:
        """Note tasks and seeds of the single environments of `owner`, which stand there now."""
        self.owner = owner
        n = min(len(tasks), MAX_ENVS)
        self.tasks[:n] = [_number(task) for task in tasks[:n]]
        self.seeds[:n] = seeds[:n]

    def single(self, env: int) -> None:
        """Note that a single environment's turn has come, within a call of all of them."""
        self.head[_ENV] = env

    def reset(self, env: int, task: str, seed: int) -> int:
        """Note that a single environment is reset; returns what was being done."""
        before = self.what
        if env < MAX_ENVS:
            self.tasks[env], self.seeds[env] = _number(task), seed
        self.begin(RESET)
        self.head[_ENV] = env
        return before

    def read(self) -> Doing:
        """The activity of this process."""
        return _read(self)


class ActivityOf(_Memory):
    """The notes of another process, which stay readable when it has died.

    Raises:
        OSError: it is gone, keeps none, or may not be read.
    """

    def __init__(self, pid: int) -> None:
        folder = f"/proc/{pid}/fd"
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if f"memfd:{_NAME}-{pid} " in os.readlink(path):  # It may have opened others', too.
                file = os.open(path, os.O_RDWR)
                break
        else:
            raise FileNotFoundError(f"process {pid} keeps no notes of what it does")
        try:
            super().__init__(file)
        finally:
            os.close(file)

    def read(self) -> Doing:
        """The activity of the process, or its last one if it has died."""
        return _read(self)


def _read(memory: _Memory) -> Doing:
    head = memory.head
    what, env = int(head[_WHAT]), int(head[_ENV])
    known = 0 <= env < MAX_ENVS
    task = int(memory.tasks[env] if known else memory.first_task[0] if env < 0 else 0)
    seed = int(memory.seeds[env]) if known else -1
    return Doing(
        what=ACTIVITIES[what],
        since=head[_SINCE],
        in_environment=what >= RESET,
        env=env if env >= 0 else None,
        task=f"{task:016x}" if task else "",
        seed=seed if seed >= 0 else None,
        thread=int(head[_THREAD]),
    )


def _number(task: str) -> int:
    """The number of a task's id; 0 where it is none."""
    try:
        return int(task, 16) % 2**64
    except ValueError:
        return 0


@lru_cache(maxsize=1)
def mine() -> Activity:
    """The notes of this process."""
    return Activity()


os.register_at_fork(after_in_child=mine.cache_clear)


@contextmanager
def during(what: int) -> Iterator[None]:
    """Note what is done inside; afterwards what was done before. Decorates functions, too."""
    activity = mine()
    before = activity.what
    activity.head[_THREAD] = threading.get_native_id()
    activity.begin(what)
    try:
        yield
    finally:
        activity.begin(before)
