"""The common settings of both sides of a comparison, from a row of the table of speed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import busy_seconds, cpu_seconds
from benchmarks.throughput.measures import Figures
from benchmarks.throughput.probe import Point, speed
from benchmarks.throughput.rows import ROWS
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.jobs.spec import job_spec, load_family
from dmrl_ray.tasks.distribution import TaskDistribution

_SAME = (
    "epochs",
    "minibatches",
    "lr",
    "gamma",
    "gae_lambda",
    "clip",
    "entropy_coef",
    "value_coef",
    "max_grad_norm",
)


@dataclass(frozen=True)
class Match:
    """A task with the settings of both sides.

    Attributes:
        row: the row of the table of speed.
        hidden: widths of the fully connected layers; empty for an LSTM.
        memory: width of the LSTM, or 0.
        num_steps: steps of a rollout in one environment; a whole trial, with memory.
        target: mean return, and the number of newest episodes (trials, with memory) it is over.
    """

    row: str
    seconds: float
    limit: float
    hidden: tuple[int, ...]
    activation: str
    memory: int
    num_envs: int
    num_steps: int
    epochs: int
    minibatches: int
    lr: float
    gamma: float
    gae_lambda: float
    clip: float
    entropy_coef: float
    value_coef: float
    max_grad_norm: float
    target: tuple[float, int]

    @property
    def batch(self) -> int:
        """Environment steps between updates."""
        return self.num_envs * self.num_steps

    @property
    def config(self) -> RunConfig:
        """The config of the row."""
        return parse_config(ROWS[self.row].text, self.row)

    def family(self) -> TaskDistribution:
        """Returns the task family."""
        return load_family(self.config.tasks)


def match(row: str, seconds: float, limit: float) -> Match:
    """Returns the settings of a row's config, defaults included."""
    config = parse_config(ROWS[row].text, row)
    spec = job_spec(config, "train")
    algorithm, family = spec.algorithm.settings, load_family(spec.tasks)
    encoder = spec.network.settings.encoder.settings
    target = ROWS[row].target
    assert target is not None
    return Match(
        row=row,
        seconds=seconds,
        limit=limit,
        hidden=getattr(encoder, "hidden_sizes", ()),
        activation=getattr(encoder, "activation", "relu"),
        memory=getattr(encoder, "hidden_size", 0),
        num_envs=config.rollout.shards * config.rollout.num_envs,
        num_steps=getattr(algorithm, "num_steps", family.trial_steps),
        target=target,
        **{name: getattr(algorithm, name) for name in _SAME},
    )


class Clock:
    """Measures time, steps, CPU and returns of a peer, like `throughput.probe.Probe` for ours.

    It is created after the setup, just before the first rollout.
    """

    def __init__(self, match: Match) -> None:
        self._match = match
        self._began = time.monotonic()
        self._first: float | None = None
        self._points: list[Point] = []
        self._reached: float | None = None
        self._newest: float | None = None

    def update(self, steps: int, newest: float | None) -> bool:
        """Adds an iteration; returns whether to stop.

        Args:
            steps: environment steps so far.
            newest: mean return of the newest episodes, if there are enough.
        """
        now, match = time.monotonic(), self._match
        if self._first is None:
            self._first = now
        self._newest = newest
        if self._reached is None and newest is not None and newest >= match.target[0]:
            self._reached = now - self._began
        elapsed = now - self._first
        if not self._points:
            if elapsed >= match.seconds / 5:
                self._note(now, steps)
            return False
        waits = self._reached is None and elapsed < match.limit
        stop = elapsed >= match.seconds and not waits
        if stop:
            self._note(now, steps)
        return stop

    def figures(self) -> Figures:
        """Returns the figures of a row of the table of speed."""
        start, stop = self._points
        own: Figures = {"to_target_s": self._reached, "final_return": self._newest}
        return {**speed(start, stop), **own}

    def _note(self, now: float, steps: int) -> None:
        self._points.append(Point(now, steps, cpu_seconds(), busy_seconds()))


def fail_on_missing(needs: Sequence[str]) -> None:
    """Exits with one sentence if a peer's package cannot be imported."""
    for name in needs:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(
                f"error: {name} must be installed ({error}); "
                "try: pip install -c constraints.txt -e '.[peers]'"
            ) from error
