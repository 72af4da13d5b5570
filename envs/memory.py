"""What a family's columns keep of the tasks they play, for its belief and its oracle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from dmrl_ray.tasks.distribution import TaskVectorEnv
from dmrl_ray.types import Array, Arrays, Task


class RememberingVectorEnv(TaskVectorEnv):
    """A vector environment that can keep what the present tasks have shown.

    An author names the arrays in `memory_fields`, empties them in `forget`, writes to them in
    `step` while `remembers`, and calls the methods here from `set_tasks` and `begin`.
    """

    memory_fields: ClassVar[tuple[str, ...]] = ()
    """Arrays (B, ...), part of the state only while `remembers`."""

    def __init__(
        self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any]
    ):
        super().__init__(num_envs, observation_space, action_space)
        self.unseen = np.ones(num_envs, np.bool_)  # the next reset starts another task

    @abstractmethod
    def forget(self, columns: np.ndarray) -> None:
        """Empty the memory of these columns."""

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        self.unseen[:] = True

    def begin(self, columns: Array) -> None:
        """Forget in those of the columns that start another task."""
        if self.remembers:
            replaced = columns[self.unseen[columns]]
            self.forget(replaced)
            self.unseen[replaced] = False

    def get_state(self) -> Arrays:
        """Copies of everything the open episodes depend on, and of what is remembered."""
        return super().get_state() | {name: np.array(getattr(self, name)) for name in self._kept()}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        super().set_state(state)
        for name in self._kept():
            setattr(self, name, np.array(state[name]))

    def _kept(self) -> tuple[str, ...]:
        return (*self.memory_fields, "unseen") if self.remembers else ()
