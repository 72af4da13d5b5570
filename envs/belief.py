"""Environments that track a belief about their tasks, for policies that observe it and experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from dmrl_ray.tasks.distribution import TaskVectorEnv
from dmrl_ray.types import Array, Arrays, Task


class BeliefVectorEnv(TaskVectorEnv):
    """A vector environment that can track a belief about each environment's task.

    An author names its arrays in `belief_fields`, sets them to the prior in `reset_belief`, updates
    them in `step` if `tracks_belief`, and calls `super()` in `set_tasks` and `begin`.
    """

    belief_fields: ClassVar[tuple[str, ...]] = ()
    """The names of the arrays (B, ...) of the belief, part of the state only if it is tracked."""

    def __init__(
        self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any]
    ):
        super().__init__(num_envs, observation_space, action_space)
        self.task_changed = np.ones(num_envs, np.bool_)  # since the latest reset

    @abstractmethod
    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Resets the beliefs of the environments of these indices to the prior."""

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        self.task_changed[:] = True

    def begin(self, env_ids: Array) -> None:
        """Resets the beliefs of those environments whose task has changed."""
        if self.tracks_belief:
            changed = env_ids[self.task_changed[env_ids]]
            self.reset_belief(changed)
            self.task_changed[changed] = False

    def get_state(self) -> Arrays:
        """Returns copies of everything the open episodes depend on, and of the beliefs."""
        belief = {name: np.array(getattr(self, name)) for name in self._tracked_fields()}
        return super().get_state() | belief

    def set_state(self, state: Arrays) -> None:
        """Restores the state that `get_state` returned."""
        super().set_state(state)
        for name in self._tracked_fields():
            setattr(self, name, np.array(state[name]))

    def _tracked_fields(self) -> tuple[str, ...]:
        return (*self.belief_fields, "task_changed") if self.tracks_belief else ()
