"""A display that measures a run instead of showing it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.machine import busy_seconds, cpu_seconds, resident_mb
from dmrl_ray.results.display import Display

PATIENCE = 10
"""Number of consecutive updates at or above the target after which it counts as reached."""


@dataclass(frozen=True)
class Point:
    """A moment of a run: clock, environment steps, CPU seconds of the run and of the machine."""

    clock: float
    steps: int
    cpu: float
    machine: float


class Probe(Display):
    """Records time, steps and CPU during a run, and stops it.

    The first fifth of the time is warm-up.

    Args:
        seconds: duration of the measurement, from the end of the first update.
        target: a mean return of episodes, until which the run is extended.
        limit: maximum seconds of the extension, from the end of the first update.
        memory_at: updates at which this process's memory is recorded; the run stops at the last.
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
        self._start: float | None = None
        self._reached = 0
        self._stopped = False

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
        """Records an update; the run calls this without `sps` after evaluations."""
        if sps is None or self._stopped:
            return
        self.updates += 1
        now = time.monotonic()
        if self._start is None:
            self._start = now
        if self.updates in self.memory_at:
            self.memory_mb[self.updates] = resident_mb(os.getpid())
        if self.target is not None and return_ is not None:
            self._reached = self._reached + 1 if return_ >= self.target else 0
        elapsed = now - self._start
        if not self.points:
            if elapsed >= self.seconds / 5:
                self._record(now, steps)
        elif self._is_over(elapsed):  # At least two updates.
            self._record(now, steps)
            self._stopped = True
            self.last()
            signal.raise_signal(signal.SIGINT)

    def last(self) -> None:
        """Hook before the run is stopped, for measurements of its processes."""

    def _is_over(self, elapsed: float) -> bool:
        if self.memory_at:
            return self.updates >= self.memory_at[-1]
        extended = self.target is not None and self._reached < PATIENCE and elapsed < self.limit
        return elapsed >= self.seconds and not extended

    def _record(self, now: float, steps: int) -> None:
        self.points.append(Point(now, steps, cpu_seconds(), busy_seconds()))


def speed(start: Point, stop: Point) -> dict[str, float]:
    """Returns steps per second, CPU microseconds per step, and busy cores of the run and others."""
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
