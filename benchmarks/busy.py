"""A task family whose steps cost a chosen CPU time, as simulators of physics do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Settings
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv, make_tasks, split_stream
from dmrl_ray.types import Array, Split, Task

_OBS = Box(-1.0, 1.0, (4,), np.float32)


class BusyVectorEnv(TaskVectorEnv):
    """Columns that compute for a while, one after the other, and then show where they stand.

    * Observation: (4,) the task's place, and how far the episode has come.
    * Action: 0 or 1; the task says which is paid.
    * Reward: 1 for the action that the task pays.
    * End: truncated after `horizon` steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("paid", "next_paid", "t")

    def __init__(self, num_envs: int, step_s: float, horizon: int):
        super().__init__(num_envs, _OBS, Discrete(2))
        self.step_s, self.horizon = step_s, horizon
        self.paid = np.zeros(num_envs, np.int64)
        self.next_paid = self.paid.copy()
        self.t = np.zeros(num_envs, np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        self.next_paid[:] = [task.params["paid"] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Start episodes in these columns."""
        self.paid[columns] = self.next_paid[columns]
        self.t[columns] = 0

    def observe(self) -> np.ndarray:
        """(B, 4)."""
        obs = np.zeros((self.num_envs, 4), np.float32)
        obs[:, 0], obs[:, 1] = self.paid, self.t / self.horizon
        return obs

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Move, then keep the processor busy for the rest of what a step costs."""
        # Of the thread: what other processes take away is not work done.
        until = time.thread_time() + self.step_s * self.num_envs
        reward = (actions == self.paid).astype(np.float32)
        self.t += 1
        truncated = self.t >= self.horizon
        obs, infos = self.auto_reset(self.observe(), truncated)
        while time.thread_time() < until:
            pass
        return obs, reward, np.zeros_like(truncated), truncated, infos

    def render(self) -> Array:
        """The column's place as a grey square."""
        return np.full((8, 8, 3), 255 * self.paid[0], np.uint8)


class Busy(TaskDistribution):
    """Which of two actions is paid."""

    class Config(Settings):
        """What a step costs."""

        step_ms: float = Field(default=1.0, ge=0)
        """CPU milliseconds of a step in one column."""

        horizon: int = Field(default=64, ge=1)
        """Steps of an episode."""

    family = "busy"

    def __init__(self, config: Config):
        self.config = config
        self.max_episode_steps = config.horizon
        self.observation_space, self.action_space = _OBS, Discrete(2)

    def make_vec(self, num_envs: int) -> BusyVectorEnv:
        """Columns that are stepped one after the other."""
        return BusyVectorEnv(num_envs, self.config.step_ms / 1000, self.config.horizon)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n tasks of a split."""
        paid = split_stream(rng, split).integers(2, size=n)
        place = np.arange(n) + 10_000 * ("train", "validation", "test").index(split)
        return make_tasks(self.family, split, {"paid": paid, "number": place})
