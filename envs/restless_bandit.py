"""Two arms whose chances drift, slowly in some trials and fast in others.

The restless bandits of Wang et al. 2016 (arXiv:1611.05763, sec. 3.1.4): how fast to forget must be
found out while being paid. The paper does not say how large the steps of the drift are; with the
defaults, Rescorla and Wagner's rule does best at the rate that the paper found best, 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.types import Array, Reference, Split, Task

from .memory import RememberingVectorEnv
from .restless_oracle import CELLS, DriftFilter, drift, filter_return


class RestlessBanditVectorEnv(RememberingVectorEnv):
    """Columns of two arms, which pay with the chances p and 1 - p; p drifts.

    * Observation: (1,) share of the pulls done.
    * Action: the arm to pull.
    * Reward: 1 with the arm's chance at this pull, else 0.
    * End: terminated after `pulls` pulls.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("chance", "next_chance", "t")
    memory_fields: ClassVar[tuple[str, ...]] = ("posterior",)

    def __init__(self, num_envs: int, pulls: int, volatility: tuple[float, ...]):
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(2))
        self.pulls = pulls
        self.filter = DriftFilter(volatility)
        self.chance = np.full((num_envs, pulls), 0.5)  # of the first arm, pull by pull
        self.next_chance = self.chance.copy()
        self.t = np.zeros(num_envs, np.int64)
        self.posterior = self.filter.prior(num_envs)  # (B, V, CELLS), of the present pull
        self._columns = np.arange(num_envs)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_chance[:] = [task.params["chance"] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Put these columns at the start of their drift."""
        if self.remembers:  # The drift starts anew, and is as volatile as before.
            volatile = self.posterior[columns].mean(axis=-1, keepdims=True)
            self.posterior[columns] = np.broadcast_to(volatile, (*volatile.shape[:2], CELLS))
        super().begin(columns)
        self.chance[columns] = self.next_chance[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """Nothing is known of these columns."""
        self.posterior[columns] = self.filter.prior(len(columns))

    def observe(self) -> np.ndarray:
        """(B, 1) share of the pulls done."""
        return (self.t / self.pulls).astype(np.float32)[:, None]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pull one arm in every column."""
        first = self.np_random.random(self.num_envs) < self.chance[self._columns, self.t]
        won = first == (actions == 0)  # The arms never agree: one draw serves either.
        if self.remembers:
            self.posterior = self.filter.after(self.posterior, first)
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        reward = won.astype(np.float32)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def belief(self) -> np.ndarray:
        """(B, V CELLS + 2): the joint chance of volatility and p, the mean of p, share of pulls."""
        joint = self.posterior.reshape(self.num_envs, -1)
        mean = self.filter.mean(self.posterior)[:, None]
        return np.concatenate([joint, mean, self.observe()], axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """(B,) the arm of the larger mean; Bayes-optimal, since both arms tell the same."""
        return np.where(self.filter.mean(self.posterior) >= 0.5, 0, 1)

    def render(self) -> Array:
        """The first arm's chance over the pulls; those to come are pale."""
        height = np.arange(32, 0, -1)[:, None] <= 32 * self.chance[0]
        image = np.where(height[..., None], [70, 130, 180], 255)
        image[:, self.t[0] :] = (image[:, self.t[0] :] + 510) // 3
        return image.astype(np.uint8)


class RestlessBandit(TaskDistribution):
    """Drifts, each a Gaussian random walk of one of the volatilities, reflected at 0 and 1.

    It starts anywhere; every split has its own draws.
    """

    class Config(Settings):
        """Length of the trials and how fast the chances drift."""

        pulls: Number = 100
        """Pulls in a trial; one episode."""

        volatility: tuple[float, ...] = Field(default=(0.03, 0.2), min_length=1)
        """Standard deviations of a step of p, one of which holds in a trial."""

    family = "restless_bandit"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self.max_episode_steps = config.pulls
        self.task_bytes = 8 * config.pulls

    def make_vec(self, num_envs: int) -> RestlessBanditVectorEnv:
        """A vector environment whose columns play drifting bandits."""
        return RestlessBanditVectorEnv(num_envs, self.config.pulls, self.config.volatility)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n drifts of a split."""
        stream = split_stream(rng, split)
        volatility = stream.choice(self.config.volatility, n)
        chance = drift(volatility, self.config.pulls, stream)
        return make_tasks(self.family, split, {"chance": chance, "volatility": volatility})

    def reference(self, task: Task) -> Reference:
        """Both ends averaged over the family; the oracle knows how p may drift, and no more."""
        pulls, volatility = self.config.pulls, self.config.volatility
        oracle = filter_return(pulls, volatility)
        return Reference(random=np.array([0.5 * pulls]), oracle=np.array([oracle]))
