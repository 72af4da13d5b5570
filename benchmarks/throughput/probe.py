"""A display that measures the run it is shown instead of showing it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.machine import busy_seconds, cpu_seconds, resident_mb
from dmrl_ray.results.display import Display

PATIENCE = 10
"""Updates in a row whose episodes reach the target, after which it counts as reached for good."""


@dataclass(frozen=True)
class Point:
    """A moment of a run: clock, environment steps, CPU seconds of the run and of the machine."""

    clock: float
    steps: int
    cpu: float
    machine: float


class Probe(Display):
    """Notes time, steps and CPU while a run is going, and asks it to stop in the end.

    The first fifth of the time is warm-up.

    Args:
        seconds: to measure, from the end of the first update on.
        target: a mean return of episodes, for which the run goes on longer.
        limit: seconds after which it stops without.
        memory_at: updates after which this process's memory is noted; the run stops after the last.
    """

    def __init__(
        self,
        seconds: float,
        target: float | None = None,
        limit: float = 0.0,
        memory_at: tuple[int, ...] = (),
    ) -> None:
        super().__init__(quiet=True)
        self.seconds, self.target, self.limit = seconds, target, limit
        self.memory_at = memory_at
        self.memory_mb: dict[int, float] = {}
        self.points: list[Point] = []
        self.updates = 0
        self._began: float | None = None
        self._reached = 0
        self._asked = False

    def update(
        self,
        stage: str,
        steps: int,
        sps: float | None = None,
        return_: float | None = None,
        score: float | None = None,
        workers_alive: int | tuple[int, int] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Called by the run after every iteration, and without `sps` after evaluations."""
        if sps is None or self._asked:
            return
        self.updates += 1
        now = time.monotonic()
        if self._began is None:
            self._began = now
        if self.updates in self.memory_at:
            self.memory_mb[self.updates] = resident_mb(os.getpid())
        if self.target is not None and return_ is not None:
            self._reached = self._reached + 1 if return_ >= self.target else 0
        elapsed = now - self._began
        if not self.points:
            if elapsed >= self.seconds / 5:
                self._note(now, steps)
        elif self._is_over(elapsed):  # Two updates at least, however slow they are.
            self._note(now, steps)
            self._asked = True
            self.last()
            signal.raise_signal(signal.SIGINT)

    def last(self) -> None:
        """The run is about to be stopped: a place to look at its processes."""

    def _is_over(self, elapsed: float) -> bool:
        if self.memory_at:
            return self.updates >= self.memory_at[-1]
        waits = self.target is not None and self._reached < PATIENCE and elapsed < self.limit
        return elapsed >= self.seconds and not waits

    def _note(self, now: float, steps: int) -> None:
        self.points.append(Point(now, steps, cpu_seconds(), busy_seconds()))


def speed(start: Point, stop: Point) -> dict[str, float]:
    """Steps a second, CPU microseconds a step, and the cores that the run and others kept busy."""
    steps, seconds, cpu = (
        stop.steps - start.steps,
        stop.clock - start.clock,
        stop.cpu - start.cpu,
    )
    return {
        "sps": steps / seconds,
        "cpu_us_per_step": 1e6 * cpu / steps,
        "cores": cpu / seconds,
        "external": max(0.0, (stop.machine - start.machine - cpu) / seconds),
    }
