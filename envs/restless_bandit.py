"""Two arms whose reward probabilities drift, slowly in some trials and fast in others.

The restless bandits of Wang et al. 2016 (arXiv:1611.05763, sec. 3.1.4): the agent must adapt its
learning rate to the volatility. The paper does not report the step size of the drift; with the
defaults, the best learning rate of Rescorla and Wagner's rule is the paper's, 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, Split, Task

from .belief import BeliefVectorEnv
from .restless_oracle import CELLS, DriftFilter, drift, filter_return


class RestlessBanditVectorEnv(BeliefVectorEnv):
    """Two arms with reward probabilities p and 1 - p, where p drifts.

    * Observation: (1,) fraction of the pulls done.
    * Action: the arm to pull.
    * Reward: 1 with the arm's reward probability at this pull, else 0.
    * End: terminated after `pulls` pulls.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("reward_prob", "next_reward_prob", "t")
    belief_fields: ClassVar[tuple[str, ...]] = ("posterior",)

    def __init__(self, num_envs: int, pulls: int, volatility: tuple[float, ...]):
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(2))
        self.pulls = pulls
        self.filter = DriftFilter(volatility)
        self.reward_prob = np.full((num_envs, pulls), 0.5)  # of the first arm at each pull
        self.next_reward_prob = self.reward_prob.copy()
        self.t = np.zeros(num_envs, np.int64)
        self.posterior = self.filter.prior(num_envs)  # (B, V, CELLS), at the current pull

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_reward_prob[:] = [task.params["chance"] for task in tasks]

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts episodes at the beginning of their drift."""
        if self.tracks_belief:  # The belief about p is reset, that about the volatility is kept.
            volatility = self.posterior[env_ids].mean(axis=-1, keepdims=True)
            self.posterior[env_ids] = np.broadcast_to(volatility, (*volatility.shape[:2], CELLS))
        super().begin(env_ids)
        self.reward_prob[env_ids] = self.next_reward_prob[env_ids]
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets the posteriors to the prior."""
        self.posterior[env_ids] = self.filter.prior(len(env_ids))

    def observe(self) -> np.ndarray:
        """Returns the fractions of pulls done (B, 1)."""
        return (self.t / self.pulls).astype(np.float32)[:, None]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pulls one arm in every environment."""
        first = self.np_random.random(self.num_envs) < self.reward_prob[self.env_ids, self.t]
        won = first == (actions == 0)  # Exactly one of the arms is rewarded: one sample is enough.
        if self.tracks_belief:
            self.posterior = self.filter.after(self.posterior, first)
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        reward = won.astype(np.float32)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def belief(self) -> np.ndarray:
        """Returns the posterior of volatility and p, the mean of p, and time, (B, V CELLS + 2)."""
        joint = self.posterior.reshape(self.num_envs, -1)
        mean = self.filter.mean(self.posterior)[:, None]
        return np.concatenate([joint, mean, self.observe()], axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """Returns the arms of the higher mean (B,): Bayes-optimal, as both inform about p alike."""
        return np.where(self.filter.mean(self.posterior) >= 0.5, 0, 1)

    def render(self) -> Array:
        """Draws the first arm's reward probability over time; future pulls are pale."""
        height = np.arange(32, 0, -1)[:, None] <= 32 * self.reward_prob[0]
        image = np.where(height[..., None], [70, 130, 180], 255)
        image[:, self.t[0] :] = (image[:, self.t[0] :] + 510) // 3
        return image.astype(np.uint8)


class RestlessBandit(TaskDistribution):
    """Gaussian random walks of one of the volatilities, reflected at 0 and 1.

    The start is uniform on [0, 1]; walks are sampled separately for each split.
    """

    class Config(Settings):
        """The length of trials and the volatility of the drift."""

        pulls: Number = 100
        """The number of pulls in a trial, which is one episode."""

        volatility: tuple[float, ...] = Field(default=(0.03, 0.2), min_length=1)
        """The possible standard deviations of a step of p; each trial has one of them."""

    family = "restless_bandit"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self.max_episode_steps = config.pulls
        self.task_bytes = 8 * config.pulls

    def make_vec(self, num_envs: int) -> RestlessBanditVectorEnv:
        """Returns a vector environment of restless bandits."""
        return RestlessBanditVectorEnv(num_envs, self.config.pulls, self.config.volatility)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n drifts of a split."""
        stream = split_stream(rng, split)
        volatility = stream.choice(self.config.volatility, n)
        reward_prob = drift(volatility, self.config.pulls, stream)
        return make_tasks(self.family, split, {"chance": reward_prob, "volatility": volatility})

    def reference(self, task: Task) -> Reference:
        """Returns the reference returns averaged over the family; the oracle is Bayes-optimal."""
        pulls, volatility = self.config.pulls, self.config.volatility
        oracle = filter_return(pulls, volatility)
        return Reference(random=np.array([0.5 * pulls]), oracle=np.array([oracle]))
