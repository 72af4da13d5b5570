"""Whether a process lives, seen from outside: by /proc and by the notes that it keeps.

    gone, stopped           the kernel says so
    blocked                 its CPU time, with that of its children, stands still, and the thread
                            that works is neither runnable nor in the kernel's input and output
    anything else           busy, however long it takes

What a process is in (`tasks.activity`) is not judged here: a sleeping environment is blocked, too,
and may take its time. A hung process cannot be told from one that computes without end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dmrl_ray.tasks.activity import ActivityOf, Doing, mine
from dmrl_ray.types import EnvironmentFault

LOOK_EVERY_S = 1.0
"""Seconds between two looks at a process."""

STOPPED_S, BLOCKED_S = 5.0, 10.0
"""A process that is stopped, or blocked outside environments, for so long is lost."""

TOLD_AFTER_S = 10.0
"""A call of an environment that takes longer is told, and again whenever that has doubled."""

NOISE, NOISE_S = 0.02, 0.05
"""CPU time that a blocked process takes all the same, per second and at most at once: Ray's own
threads take 0.002."""

_GAP_S = 3.0
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Look:
    """A process as it was found.

    Attributes:
        gone: there is no such process any more.
        stopped_s: seconds for which it has been stopped or gone.
        blocked_s: seconds for which it has been blocked.
        doing: by its notes, or its last ones; None where it keeps none.
        doing_s: seconds for which it has been in that call of that environment.
    """

    gone: bool = False
    stopped_s: float = 0.0
    blocked_s: float = 0.0
    doing: Doing | None = None
    doing_s: float = 0.0

    @property
    def lost(self) -> str | None:
        """Why a process that has work to do cannot be waited for; None if it can."""
        if self.stopped_s >= STOPPED_S:
            return "its process is gone" if self.gone else f"stopped for {self.stopped_s:.1f} s"
        computing = self.doing is not None and self.doing.what == "computing"
        if computing and self.blocked_s >= BLOCKED_S:
            return f"blocked without CPU time for {self.blocked_s:.1f} s"
        return None


@dataclass
class _Seen:
    """The findings of earlier looks at a process."""

    notes: ActivityOf | None
    looked_at: float
    progress_at: float  # of its CPU time
    cpu_s: float
    children_s: float = 0.0
    stopped_at: float | None = None
    doing: Doing | None = None
    doing_at: float = 0.0


class Watch:
    """Looks at processes of this machine again and again; also a Ray actor on other nodes.

    A process whose notes cannot be read when it is first looked at is never said to be lost: it
    may be another one, in a container of its own.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def look(self, pids: Iterable[int]) -> dict[int, Look]:
        """How these processes are; what is known of others is dropped."""
        pids = list(pids)
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in pids}
        return {pid: self._look(pid) for pid in pids}

    def attach(self, pid: int) -> None:
        """Open the notes of a process, which can be read after its death from here on."""
        now, stat = self._clock(), _stat(f"/proc/{pid}")
        self._seen[pid] = _Seen(_notes_of(pid), now, now, stat.cpu_s if stat else 0.0)

    def last(self, pid: int) -> Look:
        """The last activity of a process that has died, if it has been looked at."""
        seen = self._seen.get(pid)
        doing = seen.notes.read() if seen is not None and seen.notes is not None else None
        return Look(gone=True, doing=doing)

    def _look(self, pid: int) -> Look:
        now, stat = self._clock(), _stat(f"/proc/{pid}")
        if pid not in self._seen:
            self.attach(pid)
        seen = self._seen[pid]
        if seen.notes is None:
            return Look()
        if now - seen.looked_at > _GAP_S:  # Whoever looks was busy, or stopped itself.
            seen.progress_at, seen.stopped_at = now, None
        seen.looked_at = now
        doing = seen.notes.read()
        if doing != seen.doing:
            seen.doing, seen.doing_at, seen.progress_at = doing, now, now
            seen.cpu_s = stat.cpu_s if stat else 0.0
        # Single environments have their turns within one call of all of them.
        began = max(seen.doing_at if doing.env is not None else doing.since, doing.since)
        if stat is None or stat.state in "TtZX":
            seen.stopped_at = now if seen.stopped_at is None else seen.stopped_at
        else:
            seen.stopped_at = None
            if self._progressed(pid, seen, stat, doing.thread):
                seen.progress_at, seen.cpu_s = now, stat.cpu_s
        return Look(
            gone=stat is None or stat.state in "ZX",
            stopped_s=0.0 if seen.stopped_at is None else now - seen.stopped_at,
            blocked_s=now - seen.progress_at,
            doing=doing,
            doing_s=now - began,
        )

    def _progressed(self, pid: int, seen: _Seen, stat: _Stat, thread: int) -> bool:
        since = seen.looked_at - seen.progress_at
        noise = NOISE_S + NOISE * since
        if stat.cpu_s - seen.cpu_s > noise:
            return True
        worker = _stat(f"/proc/{pid}/task/{thread or pid}")
        if worker is not None and worker.state in "RD":
            return True
        if since < BLOCKED_S / 2:
            return False
        # It may wait for a compiler, or another program that it has started.
        before, seen.children_s = seen.children_s, _children_s(pid)
        return seen.children_s - before > _TICK_S


def told(seconds: float, last_s: float) -> bool:
    """Whether a wait is to be told now, if it was told last after `last_s` (0 is never)."""
    return seconds >= max(TOLD_AFTER_S, 2 * last_s)


def overdue(doing: Doing, seconds: float, timeout_s: float, where: str) -> EnvironmentFault:
    """The error for a call of an environment that takes longer than it may."""
    return EnvironmentFault(
        f"{where}: {doing} has not returned after {seconds:.1f} s, and environments.timeout_s is "
        f"{timeout_s:g}; mend the environment, or allow it more time"
    )


@contextmanager
def own_environments(
    family: str, timeout_s: float | None, tell: Callable[[str], None]
) -> Iterator[None]:
    """Watch the calls of environments that this process makes.

    Long ones are told, and those that take longer than `timeout_s` raise `EnvironmentFault` in the
    main thread. It is raised when the interpreter runs next: foreign code that does not return is
    told and not ended.

    Args:
        family: for messages.
        timeout_s: that a call may take; None is for ever.
        tell: is called with a sentence, from another thread.
    """
    pid, watch, over = os.getpid(), Watch(), threading.Event()
    main = threading.current_thread() is threading.main_thread()
    raises = main and timeout_s is not None
    found = Look()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if timeout_s is not None and found.doing == mine().read():  # It has not returned meanwhile.
            raise overdue(found.doing, found.doing_s, timeout_s, family)

    def look_on() -> None:
        nonlocal found
        last_s = 0.0
        while not over.wait(LOOK_EVERY_S if timeout_s is None else min(1.0, timeout_s / 2)):
            found = watch.look([pid])[pid]
            if found.doing is None or not found.doing.in_environment:
                last_s = 0.0
                continue
            if found.doing_s < last_s:
                last_s = 0.0
            if told(found.doing_s, last_s):
                last_s = found.doing_s
                tell(f"waiting in {found.doing} of {family} for {found.doing_s:.0f} s")
            if raises and timeout_s is not None and found.doing_s > timeout_s:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

    before = signal.signal(signal.SIGURG, on_signal) if raises else None
    thread = threading.Thread(target=look_on, name="liveness", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if raises:
            signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    cpu_s: float


def _stat(folder: str) -> _Stat | None:
    """State and CPU time of a process or a thread; None if there is none."""
    try:
        with open(f"{folder}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return _Stat(fields[0], int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICK_S)


def _notes_of(pid: int) -> ActivityOf | None:
    try:
        return ActivityOf(pid)
    except OSError:
        return None


def _children_s(pid: int) -> float:
    """CPU time of all processes that a process has started, and theirs."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        if (stat := _stat(f"/proc/{name}")) is not None:
            children.setdefault(stat.parent, []).append(int(name))
    seconds, left = 0.0, list(children.get(pid, ()))
    while left:
        child = left.pop()
        left += children.get(child, ())
        if (stat := _stat(f"/proc/{child}")) is not None:
            seconds += stat.cpu_s
    return seconds
