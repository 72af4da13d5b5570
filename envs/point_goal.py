"""2D navigation to a hidden goal: where it is shows only in the reward.

The setting of MAML's first reinforcement learning experiment (Finn et al. 2017,
arXiv:1703.03400, sec. 5.3), with the distance itself as the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box
from pydantic import Field

from dmrl_ray.config import Settings
from dmrl_ray.tasks import TaskDistribution, TaskVectorEnv, make_tasks, split_stream
from dmrl_ray.types import Array, Reference, Split, Task

STEP = 0.1
"""Length of the longest move along each axis."""

GOAL = 0.5
"""Goals lie in the square of this half-width around the start."""


class PointGoalVectorEnv(TaskVectorEnv):
    """Columns of points that start at the origin.

    * Observation: (2,) position.
    * Action: (2,) in [-1, 1], the move along each axis in tenths of a unit.
    * Reward: minus the distance to the goal after the move.
    * End: truncated after `horizon` steps, wherever the point is.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("position", "goal", "next_goal", "t")

    def __init__(self, num_envs: int, horizon: int):
        super().__init__(num_envs, _observation_space(horizon), Box(-1.0, 1.0, (2,), np.float32))
        self.horizon = horizon
        self.position = np.zeros((num_envs, 2), np.float32)
        self.goal = np.zeros((num_envs, 2), np.float32)
        self.next_goal = self.goal.copy()
        self.t = np.zeros(num_envs, np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        self.next_goal[:] = [task.params["goal"] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Put the points of these columns on the origin."""
        self.position[columns] = 0.0
        self.goal[columns] = self.next_goal[columns]
        self.t[columns] = 0

    def observe(self) -> np.ndarray:
        """(B, 2) positions."""
        return self.position.copy()

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Move every point."""
        move = np.minimum(np.maximum(actions, -1.0), 1.0)
        move *= STEP
        self.position += move
        offset = self.position - self.goal
        offset *= offset
        reward = offset[:, 0] + offset[:, 1]
        np.negative(np.sqrt(reward, out=reward), out=reward)
        self.t += 1
        truncated = self.t >= self.horizon
        obs, infos = self.auto_reset(self.observe(), truncated)
        return obs, reward, np.zeros(self.num_envs, np.bool_), truncated, infos

    def render(self) -> Array:
        """The square of the goals, with the goal in green and the point in black."""
        image = np.full((48, 48, 3), 255, np.uint8)
        for place, colour in ((self.goal[0], (40, 160, 60)), (self.position[0], (0, 0, 0))):
            x, y = np.clip(np.rint(24 + 40 * place), 2, 45).astype(int)
            image[46 - y : 49 - y, x - 1 : x + 2] = colour
        return image


class PointGoal(TaskDistribution):
    """Goals, uniform on [-0.5, 0.5]^2; every split has its own draws."""

    class Config(Settings):
        """Length of the episodes."""

        horizon: int = Field(default=100, ge=1)
        """Steps in an episode."""

        episodes: int = Field(default=1, ge=1)
        """Episodes in a trial."""

    family = "point_goal"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = _observation_space(config.horizon)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.max_episode_steps = config.horizon
        self.episodes_per_trial = config.episodes

    def make_vec(self, num_envs: int) -> PointGoalVectorEnv:
        """A vector environment whose columns play goals."""
        return PointGoalVectorEnv(num_envs, self.config.horizon)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n goals of a split."""
        goal = split_stream(rng, split).uniform(-GOAL, GOAL, (n, 2))
        return make_tasks(self.family, split, {"goal": goal})

    def reference(self, task: Task) -> Reference:
        """The oracle knows the goal."""
        goal, episodes = np.asarray(task.params["goal"]), self.config.episodes
        return Reference(
            random=np.full(episodes, random_return(goal, self.config.horizon)),
            oracle=np.full(episodes, known_goal_return(goal, self.config.horizon)),
        )


def _observation_space(horizon: int) -> Box:
    reach = STEP * (horizon + 1)
    return Box(-reach, reach, (2,), np.float32)


def known_goal_return(goal: np.ndarray, horizon: int) -> float:
    """Best return for a known goal: straight towards it along both axes at once.

    Each axis has its own limit, so that every move that brings one axis as near as it can get
    costs the other nothing: the distance after each step is the smallest possible one.
    """
    moved = STEP * np.arange(1, horizon + 1)
    left = np.maximum(np.abs(goal)[:, None] - moved, 0.0)
    return -float(np.hypot(left[0], left[1]).sum())


def random_return(goal: np.ndarray, horizon: int) -> float:
    """Expected return of uniformly random actions, interpolated in a table of goals."""
    table, spacing = _random_returns(horizon)
    at = np.abs(goal) / spacing
    i, j = np.minimum(at.astype(int), len(table) - 2)
    u, v = at - (i, j)
    cell = table[i : i + 2, j : j + 2]
    return float(np.array([1 - u, u]) @ cell @ np.array([1 - v, v]))


@lru_cache(maxsize=4)
def _random_returns(horizon: int) -> tuple[np.ndarray, float]:
    # The walk's density is the product of one density per axis, so that the expected visits to a
    # place, summed over an episode, are a product of two matrices. The cost of a goal is their
    # convolution with the distance, done by FFT. The step's density on the grid has the uniform
    # density's mean and variance.
    spacing, spread = STEP / 8, STEP / np.sqrt(3)
    half = int(np.ceil(min(STEP * horizon, 6 * spread * np.sqrt(horizon) + STEP) / spacing))
    weight = np.ones(17)
    weight[[0, -1]] = 0.5 - 4 / 45
    weight[[1, -2]] = 1.0 + 4 / 45
    density, walk = np.zeros((horizon, 2 * half + 1)), np.zeros(2 * half + 1)
    walk[half] = 1.0
    for t in range(horizon):
        walk = np.convolve(walk, weight / weight.sum(), mode="same")
        density[t] = walk / walk.sum()
    visits = density.T @ density
    goals = round(GOAL / spacing) + 1
    size = 2 * (half + goals) + 2 * half
    place = np.minimum(np.arange(size), size - np.arange(size)) * spacing
    distance = np.hypot(place[:, None], place)
    cost = np.fft.irfft2(np.fft.rfft2(distance) * np.fft.rfft2(visits, (size, size)), (size, size))
    return -cost[half : half + goals, half : half + goals], spacing
