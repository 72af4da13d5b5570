"""Bernoulli bandits: the agent must find the best arm while its rewards already count.

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
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, Split, Task

from .bandit_oracle import bayes_optimal_return
from .bandit_priors import Prior, dependent_return, posterior_mean, sample_reward_probs
from .belief import BeliefVectorEnv
from .gittins import MAX_PULLS, gittins_table


class BanditVectorEnv(BeliefVectorEnv):
    """Bandits with hidden reward probabilities.

    * Observation: (1,) fraction of the pulls done, as Wang et al. 2016 (arXiv:1611.05763) provide
      the time step; only previous actions and rewards carry information about the arms. Without
      it a recurrent policy must count, and learns values of 100 pulls too late to explore.
    * Action: the arm to pull.
    * Reward: 1 with the arm's reward probability, else 0.
    * End: terminated after `pulls` pulls; the number of pulls is part of the problem.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("reward_prob", "next_reward_prob", "t")
    belief_fields: ClassVar[tuple[str, ...]] = ("wins", "pulled")

    def __init__(self, num_envs: int, arms: int, pulls: int, prior: Prior = "independent"):
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(arms))
        self.pulls = pulls
        self.prior = prior
        self.reward_prob = np.full((num_envs, arms), 0.5)
        self.next_reward_prob = self.reward_prob.copy()
        self.t = np.zeros(num_envs, np.int64)
        self.wins, self.pulled = np.zeros((2, num_envs, arms), np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_reward_prob[:] = self.array([task.params["chance"] for task in tasks])

    def begin(self, env_ids: Array) -> None:
        """Starts trials at their first pull."""
        super().begin(env_ids)
        self.reward_prob[env_ids] = self.next_reward_prob[env_ids]
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets the counts of pulls to zero."""
        self.wins[env_ids] = 0
        self.pulled[env_ids] = 0

    def observe(self) -> Array:
        """Returns the fractions of pulls done (B, 1)."""
        return self.xp.asarray(self.t / self.pulls, dtype=self.xp.float32)[:, None]

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Pulls one arm in every environment."""
        xp = self.xp
        rewarded = self.np_random.random(self.num_envs) < self.reward_prob[self.env_ids, actions]
        reward = xp.asarray(rewarded, dtype=xp.float32)
        if self.tracks_belief:
            self.wins[self.env_ids, actions] += rewarded
            self.pulled[self.env_ids, actions] += 1
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, self.all_false, infos

    def belief(self) -> np.ndarray:
        """Returns posterior means, log-scaled counts of pulls, and time, (B, 2 k + 1)."""
        mean = posterior_mean(self.prior, self.wins, self.pulled)
        count = np.log1p(self.pulled) / np.log1p(self.pulls)
        done = (self.t / self.pulls)[:, None]
        return np.concatenate([mean, count, done], axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """Returns the arms (B,) of the largest Gittins index, or mean where arms are dependent."""
        if self.prior != "independent":
            mean = posterior_mean(self.prior, self.wins, self.pulled)
            return np.asarray(mean.argmax(axis=1))
        if self.pulls > MAX_PULLS:
            raise NotImplementedError(f"Gittins indices are limited to {MAX_PULLS} pulls")
        pulls_left = (self.pulls - self.t)[:, None]
        index = gittins_table(self.pulls)(pulls_left, self.wins, self.pulled)
        return np.asarray(index.argmax(axis=1))

    def best_action(self) -> np.ndarray:
        """Returns the arms of the highest reward probability (B,)."""
        return np.asarray(self.reward_prob.argmax(axis=1))

    def render(self) -> Array:
        """Draws one bar per arm, as high as its reward probability."""
        height = np.arange(32, 0, -1)[:, None] <= 32 * np.repeat(self.reward_prob[0], 8)
        return np.where(height[..., None], [70, 130, 180], 255).astype(np.uint8)


class Bandit(TaskDistribution):
    """Reward probabilities, uniform on [0, 1] by default and sampled separately for each split.

    Under each of the priors easy, medium and hard only two bandits exist, which all splits share:
    the agent learns to distinguish them.
    """

    class Config(Settings):
        """The size of the bandits and the prior of their arms."""

        arms: Size = Field(default=5, ge=2)
        """The number of arms (k)."""

        pulls: Number = 10
        """The number of pulls in a trial (n), which is one episode."""

        prior: Prior = "independent"
        """The prior of the reward probabilities: ``independent``; or two arms p and 1 - p, with p
        uniform (``correlated_uniform``) or one of {.1, .9} (``easy``), {.25, .75} (``medium``),
        {.4, .6} (``hard``)."""

        @model_validator(mode="after")
        def _has_two_dependent_arms(self) -> Bandit.Config:
            if self.prior != "independent" and self.arms != 2:
                raise ValueError(f"prior '{self.prior}' requires 2 arms, not {self.arms}")
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
        """Returns a vector environment of bandits."""
        return BanditVectorEnv(num_envs, self.config.arms, self.config.pulls, self.config.prior)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n bandits of a split."""
        stream = split_stream(rng, split)
        reward_prob = sample_reward_probs(self.config.prior, self.config.arms, n, stream)
        return make_tasks(self.family, split, {"chance": reward_prob})

    def reference(self, task: Task) -> Reference | None:
        """Returns averages over the family, since the oracle is optimal on average only.

        None where the oracle is too expensive to compute: see `bayes_optimal_return`.
        """
        pulls, prior = self.config.pulls, self.config.prior
        if prior == "independent":
            oracle = bayes_optimal_return(self.config.arms, pulls)
        else:
            oracle = dependent_return(prior, pulls)
        if oracle is None:
            return None
        return Reference(random=np.array([0.5 * pulls]), oracle=np.array([oracle]))
