"""2D navigation to a hidden goal, whose position only the reward reveals.

The setting of MAML's first reinforcement learning experiment (Finn et al. 2017,
arXiv:1703.03400, sec. 5.3), with the distance itself as the cost; and the sparse half circle of
PEARL (Rakelly et al. 2019, arXiv:1903.08254, sec. 6.3), where only reaching the goal reveals it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from gymnasium.spaces import Box
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, Split, Task

from .belief import BeliefVectorEnv

STEP = 0.1
"""The maximum length of a move along each axis."""

MAX_REFERENCE_HORIZON = 10_000
"""The longest horizon whose random return is known; its table grows as horizon^1.5, to 0.5 GB."""

Goals: TypeAlias = Literal["square", "semicircle"]

EXTENT: dict[Goals, float] = {"square": 0.5, "semicircle": 1.0}
"""The half-width of the square around the start, and the radius of the half circle above it."""

BINS = 64
"""The number of angles of a belief about the half circle."""

_ANGLE = np.pi * (np.arange(BINS) + 0.5) / BINS
_BIN_POSITION = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1).astype(np.float32)
_BIN_WIDTH = np.pi / BINS
_MIN_LOG_WEIGHT = -50.0  # of a bin that is excluded


class PointGoalVectorEnv(BeliefVectorEnv):
    """Points that start at the origin.

    * Observation: (2,) position.
    * Action: (2,) in [-1, 1], the move along each axis in tenths of a unit.
    * Reward: minus the distance to the goal after the move; or, if sparse, 1 minus the distance
      within the radius, else 0.
    * End: truncated after `horizon` steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("position", "goal", "next_goal", "t")
    belief_fields: ClassVar[tuple[str, ...]] = ("log_weight",)

    def __init__(
        self, num_envs: int, horizon: int, goals: Goals = "square", sparse_radius: float = 0.0
    ):
        super().__init__(num_envs, _observation_space(horizon), Box(-1.0, 1.0, (2,), np.float32))
        self.horizon = horizon
        self.goals: Goals = goals
        self.sparse_radius = sparse_radius
        self.log_weight = np.zeros((num_envs, BINS), np.float32)  # (B, BINS), of the goal's angle
        self.position = np.zeros((num_envs, 2), np.float32)
        self.goal = np.zeros((num_envs, 2), np.float32)
        self.next_goal = self.goal.copy()
        self.t = np.zeros(num_envs, np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_goal[:] = self.array([task.params["goal"] for task in tasks])

    def begin(self, env_ids: Array) -> None:
        """Starts episodes at the origin."""
        super().begin(env_ids)
        self.position[env_ids] = 0.0
        self.goal[env_ids] = self.next_goal[env_ids]
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets all angles of the goal to the same probability."""
        self.log_weight[env_ids] = 0.0

    def observe(self) -> Array:
        """Returns the positions (B, 2)."""
        return self.xp.asarray(self.position, copy=True)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Moves every point."""
        xp = self.xp
        self.position += STEP * actions.clip(-1.0, 1.0)
        offset = self.position - self.goal
        offset *= offset
        reward = offset[:, 0] + offset[:, 1]
        xp.negative(xp.sqrt(reward, out=reward), out=reward)
        if self.sparse_radius > 0:
            reward = xp.where(reward >= -self.sparse_radius, 1 + reward, np.float32(0.0))
        if self.tracks_belief and self.goals == "semicircle":
            self._update_belief(reward)
        self.t += 1
        truncated = self.t >= self.horizon
        obs, infos = self.auto_reset(self.observe(), truncated)
        return obs, reward, self.all_false, truncated, infos

    def _update_belief(self, reward: np.ndarray) -> None:
        # A reward gives the distance, up to the width of a bin, or excludes a small one.
        distance = np.linalg.norm(self.position[:, None] - _BIN_POSITION, axis=-1)
        observed = 1 - reward if self.sparse_radius > 0 else -reward
        error = (distance - observed[:, None]) / _BIN_WIDTH
        log_likelihood = -0.5 * error * error
        if self.sparse_radius > 0:
            unrewarded = np.where(distance < self.sparse_radius, _MIN_LOG_WEIGHT, 0.0)
            log_likelihood = np.where(reward[:, None] > 0, log_likelihood, unrewarded)
        self.log_weight += log_likelihood
        self.log_weight -= self.log_weight.max(axis=1, keepdims=True)
        np.maximum(self.log_weight, _MIN_LOG_WEIGHT, out=self.log_weight)

    def belief(self) -> np.ndarray:
        """Returns the probability of each bin of the goal's angle, from 0 to pi, (B, 64).

        Raises:
            NotImplementedError: goals lie in a square.
        """
        if self.goals != "semicircle":
            raise NotImplementedError("a belief is available for goals on the half circle alone")
        weight = np.exp(self.log_weight)
        return np.asarray(weight / weight.sum(axis=1, keepdims=True))

    def render(self) -> Array:
        """Draws the goal in green and the point in black."""
        image = np.full((48, 48, 3), 255, np.uint8)
        for point, color in ((self.goal[0], (40, 160, 60)), (self.position[0], (0, 0, 0))):
            x, y = np.clip(np.rint(24 + 20 / EXTENT[self.goals] * point), 2, 45).astype(int)
            image[46 - y : 49 - y, x - 1 : x + 2] = color
        return image


class PointGoal(TaskDistribution):
    """Goals, uniform on [-0.5, 0.5]^2 or on the upper half of the unit circle.

    They are sampled separately for each split.
    """

    class Config(Settings):
        """The length of episodes and the distribution and reward of goals."""

        horizon: Number = 100
        """The number of steps in an episode."""

        episodes: Number = 1
        """The number of episodes in a trial."""

        goal: Goals = "square"
        """The distribution of goals. ``square``: uniform on [-0.5, 0.5]^2; ``semicircle``: at
        radius 1 and an angle uniform on [0, pi]."""

        sparse_radius: float = Field(default=0.0, ge=0, lt=1)
        """With 0 the reward is minus the distance; with more it is 1 minus the distance within this
        radius and 0 outside (0.2 in PEARL)."""

    family = "point_goal"
    on_device = True

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = _observation_space(config.horizon)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.max_episode_steps = config.horizon
        self.episodes_per_trial = config.episodes

    def make_vec(self, num_envs: int) -> PointGoalVectorEnv:
        """Returns a vector environment of points."""
        return PointGoalVectorEnv(
            num_envs, self.config.horizon, self.config.goal, self.config.sparse_radius
        )

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n goals of a split."""
        stream = split_stream(rng, split)
        if self.config.goal == "semicircle":
            angle = stream.uniform(0, np.pi, n)
            goal = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        else:
            goal = stream.uniform(-EXTENT["square"], EXTENT["square"], (n, 2))
        return make_tasks(self.family, split, {"goal": goal})

    def reference(self, task: Task) -> Reference | None:
        """Returns the random return and that of an oracle that knows the goal.

        None if no goal is within reach in the horizon, or it exceeds `MAX_REFERENCE_HORIZON`.
        """
        if self.config.horizon > MAX_REFERENCE_HORIZON:
            return None
        goal, episodes = np.asarray(task.params["goal"]), self.config.episodes
        random, oracle = (
            expected_return(goal, self.config.horizon, self.config.sparse_radius)
            for expected_return in (random_return, known_goal_return)
        )
        if oracle == 0 and self.config.sparse_radius > 0:
            return None
        return Reference(np.full(episodes, random), np.full(episodes, oracle))


def _observation_space(horizon: int) -> Box:
    reach = STEP * (horizon + 1)
    return Box(-reach, reach, (2,), np.float32)


def reward_at(distance: np.ndarray, sparse_radius: float) -> np.ndarray:
    """Returns the reward of a step that ends at a distance from the goal."""
    if sparse_radius == 0:
        return -distance
    return np.where(distance <= sparse_radius, 1 - distance, 0.0)


def known_goal_return(goal: np.ndarray, horizon: int, sparse_radius: float = 0.0) -> float:
    """Computes the maximum return for a known goal, of moving towards it along both axes at once.

    The moves along the axes have separate limits, so that each axis can be optimized on its own:
    the distance after each step is the smallest possible one.
    """
    moved = STEP * np.arange(1, horizon + 1)
    offset = np.maximum(np.abs(goal)[:, None] - moved, 0.0)
    return float(reward_at(np.hypot(offset[0], offset[1]), sparse_radius).sum())


def random_return(goal: np.ndarray, horizon: int, sparse_radius: float = 0.0) -> float:
    """Returns the expected return of uniformly random actions, interpolated in a table of goals."""
    table, spacing = _random_returns(horizon, sparse_radius)
    index = np.abs(goal) / spacing
    i, j = np.minimum(index.astype(int), len(table) - 2)
    u, v = index - (i, j)
    cell = table[i : i + 2, j : j + 2]
    return float(np.array([1 - u, u]) @ cell @ np.array([1 - v, v]))


@lru_cache(maxsize=4)
def _random_returns(horizon: int, sparse_radius: float) -> tuple[np.ndarray, float]:
    # The density of the random walk is a product of one density per axis, so that the expected
    # visits to a position, summed over an episode, are a product of two matrices. The return for
    # a goal is their convolution with the reward around it, computed by FFT. The density of a step
    # on the grid has the mean and variance of the uniform density.
    spacing, std = STEP / 8, STEP / np.sqrt(3)
    half = int(np.ceil(min(STEP * horizon, 6 * std * np.sqrt(horizon) + STEP) / spacing))
    weight = np.ones(17)
    weight[[0, -1]] = 0.5 - 4 / 45
    weight[[1, -2]] = 1.0 + 4 / 45
    density, walk = np.zeros((horizon, 2 * half + 1)), np.zeros(2 * half + 1)
    walk[half] = 1.0
    for t in range(horizon):
        walk = np.convolve(walk, weight / weight.sum(), mode="same")
        density[t] = walk / walk.sum()
    visits = density.T @ density
    goals = round(EXTENT["semicircle"] / spacing) + 1
    size = 2 * (half + goals) + 2 * half
    offset = np.minimum(np.arange(size), size - np.arange(size)) * spacing
    reward = _cell_mean_reward(offset, spacing, sparse_radius)
    returns = np.fft.irfft2(np.fft.rfft2(reward) * np.fft.rfft2(visits, (size, size)), (size, size))
    return returns[half : half + goals, half : half + goals], spacing


def _cell_mean_reward(offset: np.ndarray, spacing: float, sparse_radius: float) -> np.ndarray:
    # The mean over each cell of the grid, as the rim of a sparse goal lies between grid points.
    shifts = (np.arange(5) - 2) / 5 * spacing if sparse_radius > 0 else np.zeros(1)
    return np.mean(
        [
            reward_at(np.hypot(offset[:, None] + x, offset + y), sparse_radius)
            for x in shifts
            for y in shifts
        ],
        axis=0,
    )
