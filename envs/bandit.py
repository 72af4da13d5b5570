"""Bernoulli bandits: which of the arms pays most, found out while being paid.

The setting of RL^2's table 1 (Duan et al. 2016, arXiv:1611.02779).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config import Settings
from dmrl_ray.tasks import TaskDistribution, TaskVectorEnv, make_tasks, split_stream
from dmrl_ray.types import Array, Reference, Split, Task

from .bandit_oracle import bayes_optimal_return


class BanditVectorEnv(TaskVectorEnv):
    """Columns of bandits with hidden chances of a reward.

    * Observation: (1,) share of the pulls done, as Wang et al. 2016 (arXiv:1611.05763) show the
      trial's number; what the arms pay is told by previous actions and rewards alone. Without it
      the memory must count, and values of 100 pulls are learned too late to explore by.
    * Action: the arm to pull.
    * Reward: 1 with the arm's chance, else 0.
    * End: terminated after `pulls` pulls; the number of pulls is part of the problem.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("chance", "next_chance", "t")

    def __init__(self, num_envs: int, arms: int, pulls: int):
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(arms))
        self.pulls = pulls
        self.chance = np.full((num_envs, arms), 0.5)
        self.next_chance = self.chance.copy()
        self.t = np.zeros(num_envs, np.int64)
        self._columns = np.arange(num_envs)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        self.next_chance[:] = [task.params["chance"] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Put the pulls of these columns back to none."""
        self.chance[columns] = self.next_chance[columns]
        self.t[columns] = 0

    def observe(self) -> np.ndarray:
        """(B, 1) share of the pulls done."""
        return (self.t / self.pulls).astype(np.float32)[:, None]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pull one arm in every column."""
        chance = self.chance[self._columns, actions]
        reward = (self.np_random.random(self.num_envs) < chance).astype(np.float32)
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def render(self) -> Array:
        """One bar per arm, as high as its chance."""
        height = np.arange(32, 0, -1)[:, None] <= 32 * np.repeat(self.chance[0], 8)
        return np.where(height[..., None], [70, 130, 180], 255).astype(np.uint8)


class Bandit(TaskDistribution):
    """Chances of the arms, each uniform on [0, 1]; every split has its own draws."""

    class Config(Settings):
        """Size of the bandits."""

        arms: int = Field(default=5, ge=2)
        """Arms of each bandit (k)."""

        pulls: int = Field(default=10, ge=1)
        """Pulls in a trial (n); one episode."""

    family = "bandit"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(config.arms)
        self.max_episode_steps = config.pulls

    def make_vec(self, num_envs: int) -> BanditVectorEnv:
        """A vector environment whose columns play bandits."""
        return BanditVectorEnv(num_envs, self.config.arms, self.config.pulls)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n bandits of a split."""
        chance = split_stream(rng, split).random((n, self.config.arms))
        return make_tasks(self.family, split, {"chance": chance})

    def reference(self, task: Task) -> Reference | None:
        """Both ends averaged over the family, since the oracle is optimal on average only.

        None where no oracle is affordable: see `bayes_optimal_return`.
        """
        oracle = bayes_optimal_return(self.config.arms, self.config.pulls)
        if oracle is None:
            return None
        return Reference(random=np.array([0.5 * self.config.pulls]), oracle=np.array([oracle]))
