"""2D navigation to a hidden goal: where it is shows only in the reward.

The setting of MAML's first reinforcement learning experiment (Finn et al. 2017,
arXiv:1703.03400, sec. 5.3), with the distance itself as the cost; and the sparse half circle of
PEARL (Rakelly et al. 2019, arXiv:1903.08254, sec. 6.3), where a goal must be met to be known.
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
from dmrl_ray.types import Array, Reference, Split, Task

from .memory import RememberingVectorEnv

STEP = 0.1
"""Length of the longest move along each axis."""

LONGEST = 10_000
"""Steps of the longest episode whose random return is known: its table grows as horizon^1.5, and
takes 0.5 GB there."""

Goals: TypeAlias = Literal["square", "semicircle"]

EXTENT: dict[Goals, float] = {"square": 0.5, "semicircle": 1.0}
"""Half-width of the square around the start, radius of the half circle above it."""

BINS = 64
"""Angles between which a belief about the half circle can tell."""

_ANGLE = np.pi * (np.arange(BINS) + 0.5) / BINS
_PLACE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1).astype(np.float32)
_TOLERANCE = np.pi / BINS
_REFUTED = -50.0


class PointGoalVectorEnv(RememberingVectorEnv):
    """Columns of points that start at the origin.

    * Observation: (2,) position.
    * Action: (2,) in [-1, 1], the move along each axis in tenths of a unit.
    * Reward: minus the distance to the goal after the move; or, if sparse, 1 minus the distance
      where that is within the radius, else 0.
    * End: truncated after `horizon` steps, wherever the point is.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("position", "goal", "next_goal", "t")
    memory_fields: ClassVar[tuple[str, ...]] = ("log_weight",)

    def __init__(
        self, num_envs: int, horizon: int, goals: Goals = "square", sparse_radius: float = 0.0
    ):
        super().__init__(num_envs, _observation_space(horizon), Box(-1.0, 1.0, (2,), np.float32))
        self.horizon = horizon
        self.goals: Goals = goals
        self.sparse_radius = sparse_radius
        self.log_weight = np.zeros((num_envs, BINS), np.float32)  # of each angle of the goal
        self.position = np.zeros((num_envs, 2), np.float32)
        self.goal = np.zeros((num_envs, 2), np.float32)
        self.next_goal = self.goal.copy()
        self.t = np.zeros(num_envs, np.int64)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_goal[:] = self.array([task.params["goal"] for task in tasks])

    def begin(self, columns: Array) -> None:
        """Put the points of these columns on the origin."""
        super().begin(columns)
        self.position[columns] = 0.0
        self.goal[columns] = self.next_goal[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """The goals of these columns may be at any angle."""
        self.log_weight[columns] = 0.0

    def observe(self) -> Array:
        """(B, 2) positions."""
        return self.xp.asarray(self.position, copy=True)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Move every point."""
        xp = self.xp
        self.position += STEP * actions.clip(-1.0, 1.0)
        offset = self.position - self.goal
        offset *= offset
        reward = offset[:, 0] + offset[:, 1]
        xp.negative(xp.sqrt(reward, out=reward), out=reward)
        if self.sparse_radius > 0:
            reward = xp.where(reward >= -self.sparse_radius, 1 + reward, np.float32(0.0))
        if self.remembers and self.goals == "semicircle":
            self._weigh(reward)
        self.t += 1
        truncated = self.t >= self.horizon
        obs, infos = self.auto_reset(self.observe(), truncated)
        return obs, reward, self.never, truncated, infos

    def _weigh(self, reward: np.ndarray) -> None:
        # A reward tells the distance, up to what a bin can resolve, or that it is a large one.
        distance = np.linalg.norm(self.position[:, None] - _PLACE, axis=-1)
        told = 1 - reward if self.sparse_radius > 0 else -reward
        misfit = (distance - told[:, None]) / _TOLERANCE
        evidence = -0.5 * misfit * misfit
        if self.sparse_radius > 0:
            passed = np.where(distance < self.sparse_radius, _REFUTED, 0.0)
            evidence = np.where(reward[:, None] > 0, evidence, passed)
        self.log_weight += evidence
        self.log_weight -= self.log_weight.max(axis=1, keepdims=True)
        np.maximum(self.log_weight, _REFUTED, out=self.log_weight)

    def belief(self) -> np.ndarray:
        """(B, 64) the chance of each bin of angles to hold the goal, from 0 to pi.

        Raises:
            NotImplementedError: goals lie in a square.
        """
        if self.goals != "semicircle":
            raise NotImplementedError("a belief is kept about goals on the half circle alone")
        weight = np.exp(self.log_weight)
        return np.asarray(weight / weight.sum(axis=1, keepdims=True))

    def render(self) -> Array:
        """All goals around the start, the goal in green and the point in black."""
        image = np.full((48, 48, 3), 255, np.uint8)
        for place, colour in ((self.goal[0], (40, 160, 60)), (self.position[0], (0, 0, 0))):
            x, y = np.clip(np.rint(24 + 20 / EXTENT[self.goals] * place), 2, 45).astype(int)
            image[46 - y : 49 - y, x - 1 : x + 2] = colour
        return image


class PointGoal(TaskDistribution):
    """Goals, uniform on [-0.5, 0.5]^2 or on the upper half of the unit circle; every split has
    its own draws."""

    class Config(Settings):
        """Length of the episodes, where goals lie and how they pay."""

        horizon: Number = 100
        """Steps in an episode."""

        episodes: Number = 1
        """Episodes in a trial."""

        goal: Goals = "square"
        """``square``: uniform on [-0.5, 0.5]^2; ``semicircle``: at radius 1 and an angle uniform
        on [0, pi]."""

        sparse_radius: float = Field(default=0.0, ge=0, lt=1)
        """0 pays minus the distance at every step; more pays 1 minus the distance within this
        radius and nothing outside (0.2 in PEARL)."""

    family = "point_goal"
    on_device = True

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = _observation_space(config.horizon)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.max_episode_steps = config.horizon
        self.episodes_per_trial = config.episodes

    def make_vec(self, num_envs: int) -> PointGoalVectorEnv:
        """A vector environment whose columns play goals."""
        return PointGoalVectorEnv(
            num_envs, self.config.horizon, self.config.goal, self.config.sparse_radius
        )

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n goals of a split."""
        stream = split_stream(rng, split)
        if self.config.goal == "semicircle":
            angle = stream.uniform(0, np.pi, n)
            goal = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        else:
            goal = stream.uniform(-EXTENT["square"], EXTENT["square"], (n, 2))
        return make_tasks(self.family, split, {"goal": goal})

    def reference(self, task: Task) -> Reference | None:
        """The oracle knows the goal.

        None if the horizon is too short to be paid at all, or longer than `LONGEST`.
        """
        if self.config.horizon > LONGEST:
            return None
        goal, episodes = np.asarray(task.params["goal"]), self.config.episodes
        random, oracle = (
            of(goal, self.config.horizon, self.config.sparse_radius)
            for of in (random_return, known_goal_return)
        )
        if oracle == 0 and self.config.sparse_radius > 0:
            return None
        return Reference(np.full(episodes, random), np.full(episodes, oracle))


def _observation_space(horizon: int) -> Box:
    reach = STEP * (horizon + 1)
    return Box(-reach, reach, (2,), np.float32)


def reward_at(distance: np.ndarray, sparse_radius: float) -> np.ndarray:
    """What a step pays that ends at a distance from the goal."""
    if sparse_radius == 0:
        return -distance
    return np.where(distance <= sparse_radius, 1 - distance, 0.0)


def known_goal_return(goal: np.ndarray, horizon: int, sparse_radius: float = 0.0) -> float:
    """Best return for a known goal: straight towards it along both axes at once.

    Each axis has its own limit, so that every move that brings one axis as near as it can get
    costs the other nothing: the distance after each step is the smallest possible one.
    """
    moved = STEP * np.arange(1, horizon + 1)
    left = np.maximum(np.abs(goal)[:, None] - moved, 0.0)
    return float(reward_at(np.hypot(left[0], left[1]), sparse_radius).sum())


def random_return(goal: np.ndarray, horizon: int, sparse_radius: float = 0.0) -> float:
    """Expected return of uniformly random actions, interpolated in a table of goals."""
    table, spacing = _random_returns(horizon, sparse_radius)
    at = np.abs(goal) / spacing
    i, j = np.minimum(at.astype(int), len(table) - 2)
    u, v = at - (i, j)
    cell = table[i : i + 2, j : j + 2]
    return float(np.array([1 - u, u]) @ cell @ np.array([1 - v, v]))


@lru_cache(maxsize=4)
def _random_returns(horizon: int, sparse_radius: float) -> tuple[np.ndarray, float]:
    # The walk's density is the product of one density per axis, so that the expected visits to a
    # place, summed over an episode, are a product of two matrices. What a goal pays is their
    # convolution with the reward around it, done by FFT. The step's density on the grid has the
    # uniform density's mean and variance.
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
    goals = round(EXTENT["semicircle"] / spacing) + 1
    size = 2 * (half + goals) + 2 * half
    place = np.minimum(np.arange(size), size - np.arange(size)) * spacing
    around = _blurred_reward(place, spacing, sparse_radius)
    paid = np.fft.irfft2(np.fft.rfft2(around) * np.fft.rfft2(visits, (size, size)), (size, size))
    return paid[half : half + goals, half : half + goals], spacing


def _blurred_reward(place: np.ndarray, spacing: float, sparse_radius: float) -> np.ndarray:
    # The mean over each cell of the grid: the rim of a sparse goal passes between its points.
    offsets = (np.arange(5) - 2) / 5 * spacing if sparse_radius > 0 else np.zeros(1)
    return np.mean(
        [
            reward_at(np.hypot(place[:, None] + x, place + y), sparse_radius)
            for x in offsets
            for y in offsets
        ],
        axis=0,
    )
