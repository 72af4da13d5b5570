"""A task family with a chosen CPU time per step, like a physics simulator."""

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
    """Environments that are stepped sequentially, each with a busy loop.

    * Observation: (4,) the rewarded action, the fraction of the episode that has passed, and zeros.
    * Action: 0 or 1.
    * Reward: 1 for the task's rewarded action.
    * End: truncated after `horizon` steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("rewarded", "next_rewarded", "t")

    def __init__(self, num_envs: int, step_s: float, horizon: int):
        super().__init__(num_envs, _OBS, Discrete(2))
        self.step_s, self.horizon = step_s, horizon
        self.rewarded = np.zeros(num_envs, np.int64)
        self.next_rewarded = self.rewarded.copy()
        self.t = np.zeros(num_envs, np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, from its next reset on."""
        self.next_rewarded[:] = [task.params["rewarded"] for task in tasks]

    def begin(self, envs: np.ndarray) -> None:
        """Starts episodes in these environments."""
        self.rewarded[envs] = self.next_rewarded[envs]
        self.t[envs] = 0

    def observe(self) -> np.ndarray:
        """Returns observations (B, 4)."""
        obs = np.zeros((self.num_envs, 4), np.float32)
        obs[:, 0], obs[:, 1] = self.rewarded, self.t / self.horizon
        return obs

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps all environments, and keeps the processor busy for the rest of the step's cost."""
        # CPU time of this thread, which other processes do not affect.
        until = time.thread_time() + self.step_s * self.num_envs
        reward = (actions == self.rewarded).astype(np.float32)
        self.t += 1
        truncated = self.t >= self.horizon
        obs, infos = self.auto_reset(self.observe(), truncated)
        while time.thread_time() < until:
            pass
        return obs, reward, np.zeros_like(truncated), truncated, infos

    def render(self) -> Array:
        """Returns a square, white if action 1 is rewarded."""
        return np.full((8, 8, 3), 255 * self.rewarded[0], np.uint8)


class Busy(TaskDistribution):
    """Tasks that differ in which of two actions is rewarded."""

    class Config(Settings):
        """The cost and number of steps."""

        step_ms: float = Field(default=1.0, ge=0)
        """CPU milliseconds of a step of one environment."""

        horizon: int = Field(default=64, ge=1)
        """Steps of an episode."""

    family = "busy"

    def __init__(self, config: Config):
        self.config = config
        self.max_episode_steps = config.horizon
        self.observation_space, self.action_space = _OBS, Discrete(2)

    def make_vec(self, num_envs: int) -> BusyVectorEnv:
        """Returns environments that are stepped sequentially."""
        return BusyVectorEnv(num_envs, self.config.step_ms / 1000, self.config.horizon)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n tasks of a split."""
        rewarded = split_stream(rng, split).integers(2, size=n)
        number = np.arange(n) + 10_000 * ("train", "validation", "test").index(split)
        return make_tasks(self.family, split, {"rewarded": rewarded, "number": number})
