"""Algorithms of other libraries, as stages run them.

    ours       workers: collect --> learner: update         two halves, in `control.train_loop`
    external   iterate: samples and learns, as the library does it

Tasks, stages, budgets, validation, tables, commits and resume stay as they are. An external
algorithm brings a network of its own, whose weights are arrays like any other's, and is named by a
config where an `Algorithm` is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from dmrl_ray.config.components import Settings, at_default
from dmrl_ray.config.schema import Adapt, Stage
from dmrl_ray.jobs.messages import CollectReport, EvaluateCall, TrainReport
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.types import Arrays, Columns, join_rows


class ExternalAlgorithm(ABC):
    """One job of an algorithm of another library; cheap to make, and loaded when it is used.

    Args:
        spec: the job.
        processes: that it may sample with; 0 is this one alone.
    """

    Config: ClassVar[type[Settings]]
    """Settings, as the library names them."""

    learns_to_act: bool = True

    def __init__(self, spec: JobSpec, processes: int = 0) -> None:
        self.spec = spec
        self.processes = processes
        self.version = 0  # iterations so far

    @classmethod
    def schedules(cls, config: Settings) -> list[str]:
        """None of its settings knows the budget."""
        return []

    @property
    @abstractmethod
    def memory_spans_trial(self) -> bool:
        """The policy's memory survives the ends of episodes."""

    @abstractmethod
    def check(self, start: ExternalAlgorithm | None) -> None:
        """See that the settings fit the tasks, and the policy of the job that this starts from.

        Raises:
            ValueError: they do not; the message names the setting.
        """

    @abstractmethod
    def iterate(
        self, env_steps: int, *, learn: bool = True
    ) -> tuple[CollectReport, dict[str, float]]:
        """Sample, and learn from it: rows of the episodes that ended, and metrics.

        Args:
            env_steps: of the job, before this iteration.
            learn: False leaves the policy as it is.
        """

    @abstractmethod
    def play(self, call: EvaluateCall, weights: Arrays) -> Columns:
        """Rows of one trial on each of the call's tasks, without learning."""

    @abstractmethod
    def weights(self) -> Arrays:
        """Weights of the policy, and of whatever learns beside it."""

    @abstractmethod
    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere.

        Raises:
            ValueError: the weights do not fit.
        """

    @abstractmethod
    def get_state(self) -> Arrays:
        """All that the next iteration depends on, as far as the library keeps it."""

    @abstractmethod
    def set_state(self, state: Arrays, version: int) -> None:
        """Continue from `get_state`'s answer."""

    @abstractmethod
    def close(self) -> None:
        """End its processes."""

    def published(self) -> Weights:
        """The weights with their version."""
        return Weights(self.version, self.weights())

    def train(self, weights: Arrays, updates: int) -> TrainReport:
        """Do a small job whole, as `RolloutWorker.train` does; the last iteration only samples."""
        self.load_weights(weights)
        parts: list[Columns] = []
        env_steps = 0
        for iteration in range(updates + 1):
            report, _ = self.iterate(env_steps, learn=iteration < updates)
            report.episodes["adaptation_step"] = np.full_like(
                report.episodes["adaptation_step"], iteration
            )
            parts.append(report.episodes)
            env_steps += report.env_steps
        rows = join_rows(parts)
        return TrainReport(rows, self.weights(), env_steps)


def external_of(spec: JobSpec, processes: int = 0) -> ExternalAlgorithm | None:
    """A job's algorithm, if it is one of another library."""
    kind = spec.algorithm.load("algorithm")
    return kind(spec, processes) if issubclass(kind, ExternalAlgorithm) else None


def check_external(spec: JobSpec, stage: Stage, source: JobSpec | None) -> bool:
    """See that another library's algorithm can run a stage; False if none is to.

    Args:
        source: the job of the stage that this one starts from, if it does.

    Raises:
        ValueError: it cannot, or the stage would start from a policy of another's.
    """
    external, start = external_of(spec), None if source is None else external_of(source)
    if source is not None and type(external) is not type(start):
        raise ValueError(
            f"init_from: the policy of stage {source.stage!r} is {source.algorithm_name}'s, whose "
            f"network {spec.algorithm_name} does not know; use algorithm: "
            f"{{type: {source.algorithm.type}}} here, or start from another stage"
        )
    if external is None:
        return False
    if isinstance(stage, Adapt):
        raise ValueError(f"type: {spec.algorithm_name} cannot adapt without resets; use evaluate")
    if source is None and stage.init_from is not None:
        raise ValueError(f"init_from: {spec.algorithm_name} starts from stages of its own alone")
    for setting in ("network", "rollout", "max_policy_lag", "record", "trainable"):
        if setting in type(stage).model_fields and not at_default(stage, setting):
            raise ValueError(
                f"{setting}: {spec.algorithm_name} has a network and a loop of its own, which know "
                "nothing of this; leave it out"
            )
    external.check(start)
    return True
