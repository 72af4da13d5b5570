"""Bernoulli bandits: which of the arms pays most, found out while being paid.

The setting of RL^2's table 1 (Duan et al. 2016, arXiv:1611.02779), and the two-armed bandits of
Wang et al. 2016 (arXiv:1611.05763).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field, model_validator

from dmrl_ray.config.schema import Number, Settings, Size
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.types import Array, Reference, Split, Task

from .bandit_oracle import bayes_optimal_return
from .bandit_priors import Prior, dependent_return, draw_chances, posterior_mean
from .gittins import LONGEST, gittins_table
from .memory import RememberingVectorEnv


class BanditVectorEnv(RememberingVectorEnv):
    """Columns of bandits with hidden chances of a reward.

    * Observation: (1,) share of the pulls done, as Wang et al. 2016 (arXiv:1611.05763) show the
      trial's number; what the arms pay is told by previous actions and rewards alone. Without it
      the memory must count, and values of 100 pulls are learned too late to explore by.
    * Action: the arm to pull.
    * Reward: 1 with the arm's chance, else 0.
    * End: terminated after `pulls` pulls; the number of pulls is part of the problem.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("chance", "next_chance", "t")
    memory_fields: ClassVar[tuple[str, ...]] = ("wins", "pulled")

    def __init__(self, num_envs: int, arms: int, pulls: int, prior: Prior = "independent"):
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(arms))
        self.pulls = pulls
        self.prior = prior
        self.chance = np.full((num_envs, arms), 0.5)
        self.next_chance = self.chance.copy()
        self.t = np.zeros(num_envs, np.int64)
        self.wins, self.pulled = np.zeros((2, num_envs, arms), np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_chance[:] = self.array([task.params["chance"] for task in tasks])

    def begin(self, columns: Array) -> None:
        """Put the pulls of these columns back to none."""
        super().begin(columns)
        self.chance[columns] = self.next_chance[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """No pulls of these columns are known."""
        self.wins[columns] = 0
        self.pulled[columns] = 0

    def observe(self) -> Array:
        """(B, 1) share of the pulls done."""
        return self.xp.asarray(self.t / self.pulls, dtype=self.xp.float32)[:, None]

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Pull one arm in every column."""
        xp = self.xp
        paid = self.np_random.random(self.num_envs) < self.chance[self.everyone, actions]
        reward = xp.asarray(paid, dtype=xp.float32)
        if self.remembers:
            self.wins[self.everyone, actions] += paid
            self.pulled[self.everyone, actions] += 1
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, self.never, infos

    def belief(self) -> np.ndarray:
        """(B, 2 k + 1) the arms' means, their pulls on a log scale, and the share of pulls done."""
        mean = posterior_mean(self.prior, self.wins, self.pulled)
        count = np.log1p(self.pulled) / np.log1p(self.pulls)
        done = (self.t / self.pulls)[:, None]
        return np.concatenate([mean, count, done], axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """(B,) arms of the largest index, or mean where arms are dependent; the first of equals."""
        if self.prior != "independent":
            mean = posterior_mean(self.prior, self.wins, self.pulled)
            return np.asarray(mean.argmax(axis=1))
        if self.pulls > LONGEST:
            raise NotImplementedError(f"an index table is for at most {LONGEST} pulls")
        left = (self.pulls - self.t)[:, None]
        return np.asarray(gittins_table(self.pulls)(left, self.wins, self.pulled).argmax(axis=1))

    def best_action(self) -> np.ndarray:
        """(B,) the arm that pays most."""
        return np.asarray(self.chance.argmax(axis=1))

    def render(self) -> Array:
        """One bar per arm, as high as its chance."""
        height = np.arange(32, 0, -1)[:, None] <= 32 * np.repeat(self.chance[0], 8)
        return np.where(height[..., None], [70, 130, 180], 255).astype(np.uint8)


class Bandit(TaskDistribution):
    """Chances of the arms, uniform on [0, 1] by default; every split has its own draws.

    Only two bandits exist under each of the priors easy, medium and hard, so that all splits share
    them: what is learned there is how to tell the two apart.
    """

    class Config(Settings):
        """Size of the bandits and what their arms may be."""

        arms: Size = Field(default=5, ge=2)
        """Arms of each bandit (k)."""

        pulls: Number = 10
        """Pulls in a trial (n); one episode."""

        prior: Prior = "independent"
        """``independent`` arms; or two arms p and 1 - p, with p uniform (``correlated_uniform``) or
        one of {.1, .9} (``easy``), {.25, .75} (``medium``), {.4, .6} (``hard``)."""

        @model_validator(mode="after")
        def _has_two_dependent_arms(self) -> Bandit.Config:
            if self.prior != "independent" and self.arms != 2:
                raise ValueError(f"prior '{self.prior}' is one of 2 arms, not of {self.arms}")
            return self

    family = "bandit"
    on_device = True

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(config.arms)
        self.max_episode_steps = config.pulls
        self.task_bytes = 8 * config.arms

    def make_vec(self, num_envs: int) -> BanditVectorEnv:
        """A vector environment whose columns play bandits."""
        return BanditVectorEnv(num_envs, self.config.arms, self.config.pulls, self.config.prior)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n bandits of a split."""
        chance = draw_chances(self.config.prior, self.config.arms, n, split_stream(rng, split))
        return make_tasks(self.family, split, {"chance": chance})

    def reference(self, task: Task) -> Reference | None:
        """Both ends averaged over the family, since the oracle is optimal on average only.

        None where no oracle is affordable: see `bayes_optimal_return`.
        """
        pulls, prior = self.config.pulls, self.config.prior
        if prior == "independent":
            oracle = bayes_optimal_return(self.config.arms, pulls)
        else:
            oracle = dependent_return(prior, pulls)
        if oracle is None:
            return None
        return Reference(random=np.array([0.5 * pulls]), oracle=np.array([oracle]))
