"""A grid with a hidden goal cell: search it in the first episode, go there in the others.

VariBAD's GridNavi (Zintgraf et al. 2020, arXiv:1910.08348, sec. 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config import Number, Settings
from dmrl_ray.tasks import TaskDistribution, drawn_from, make_tasks, split_stream
from dmrl_ray.types import Array, Reference, Split, Task

from .memory import RememberingVectorEnv

SIZE = 5
HORIZON = 15

CELLS = np.array([(x, y) for y in range(SIZE) for x in range(SIZE)])
"""Coordinates of cell x + SIZE * y."""

GOALS = np.flatnonzero((CELLS >= 2).any(axis=1))
"""The 21 cells outside the 2 x 2 corner at the start, which is cell 0."""

MOVES = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
"""Stay and the four moves; a move off the grid stays."""

_landing = np.clip(CELLS[:, None] + MOVES, 0, SIZE - 1)
NEXT_CELL: np.ndarray = _landing[..., 0] + SIZE * _landing[..., 1]
"""(cells, actions)."""

DISTANCE: np.ndarray = np.abs(CELLS[:, None] - CELLS).sum(axis=-1)
"""(cells, cells) steps from one to another."""

TOWARDS: np.ndarray = DISTANCE[NEXT_CELL].argmin(axis=1)
"""(cells, cells) the first action of a shortest path: along x before y, and 0 at its end."""

SWEEP = np.array([10, 15, 20, 21, 16, 11, 12, 7, 8, 13, 18, 17, 22, 23, 2, 3, 4, 9, 14, 19, 24])
"""All goals: 14 that one episode can meet from its second step on, and then 7 that lie on one
shortest path along two sides."""


class GridNavVectorEnv(RememberingVectorEnv):
    """Columns of grids.

    * Observation: (25,) the own cell, one-hot.
    * Action: 0 stay, 1 right, 2 left, 3 up, 4 down.
    * Reward: 1 on the goal after the move, else -0.1. The goal does not end the episode.
    * End: truncated after 15 steps; ``success`` is being on the goal.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("cell", "goal", "next_goal", "t")
    fixed_fields: ClassVar[tuple[str, ...]] = ("_next_cell", "_one_hot")
    memory_fields: ClassVar[tuple[str, ...]] = ("possible",)

    def __init__(self, num_envs: int):
        super().__init__(num_envs, Box(0.0, 1.0, (len(CELLS),), np.float32), Discrete(len(MOVES)))
        self.cell = np.zeros(num_envs, np.int64)
        self.goal = np.full(num_envs, GOALS[-1])
        self.next_goal = self.goal.copy()
        self.t = np.zeros(num_envs, np.int64)
        self.possible = np.zeros((num_envs, len(CELLS)), np.bool_)  # where the goal may be
        self.possible[:, GOALS] = True
        self._next_cell = NEXT_CELL
        self._one_hot = np.eye(len(CELLS), dtype=np.float32)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_goal[:] = self.array([task.params["goal"] for task in tasks])

    def begin(self, columns: Array) -> None:
        """Put the agents of these columns on the start."""
        super().begin(columns)
        self.cell[columns] = 0
        self.goal[columns] = self.next_goal[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """The goals of these columns may be anywhere."""
        self.possible[columns] = False
        self.possible[np.ix_(columns, GOALS)] = True

    def observe(self) -> Array:
        """(B, 25) one-hot cells."""
        return self.rows(self._one_hot, self.cell)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Move every agent."""
        self.cell = self._next_cell[self.cell, actions]
        found = self.cell == self.goal
        reward = self.xp.where(found, np.float32(1.0), np.float32(-0.1))
        if self.remembers:
            self.possible[self.everyone, self.cell] = found
            self.possible[found] = self._one_hot[self.cell[found]] > 0
        self.t += 1
        truncated = self.t >= HORIZON
        obs, infos = self.auto_reset(self.observe(), truncated)
        infos["success"] = found
        return obs, reward, self.never, truncated, infos

    def belief(self) -> np.ndarray:
        """(B, 26) the chance of each cell to be the goal, and whether it is known."""
        count = self.possible.sum(axis=1, keepdims=True)
        return np.concatenate([self.possible / count, count == 1], axis=1, dtype=np.float32)

    def oracle_action(self) -> np.ndarray:
        """(B,) the first move towards the nearest cell that may be the goal.

        Of equally near ones it takes the first of `SWEEP`. From the start this is Bayes-optimal:
        see `bayes_return`. From elsewhere it is a search that wastes few steps.
        """
        rank = np.where(self.possible, _RANK.take(self.cell, axis=0), _RANK.max() + 1)
        return np.asarray(TOWARDS[self.cell, rank.argmin(axis=1)])

    def best_action(self) -> np.ndarray:
        """(B,) a move towards the goal."""
        return np.asarray(TOWARDS[self.cell, self.goal])

    def render(self) -> Array:
        """The grid from above, with the goal in green and the agent in black."""
        image = np.full((SIZE, SIZE, 3), 255, np.uint8)
        image[tuple(CELLS[self.goal[0]][::-1])] = (40, 160, 60)
        image[tuple(CELLS[self.cell[0]][::-1])] = (0, 0, 0)
        return image[::-1].repeat(8, axis=0).repeat(8, axis=1)


_RANK: np.ndarray = len(CELLS) * DISTANCE
_RANK[:, SWEEP] += np.arange(len(SWEEP))


class GridNav(TaskDistribution):
    """Goals, uniform over the 21 cells that are not near the start.

    By default every split draws from all of them, as VariBAD does: what is learned is how to
    search, and there is little to generalise over. `held_out` keeps cells for the other splits.
    """

    class Config(Settings):
        """Length of the trials and what is held out."""

        episodes: Number = 4
        """Episodes in a trial."""

        held_out: int = Field(default=0, ge=0, le=10)
        """Goal cells kept for the validation split, and as many others for the test split; 0
        lets every split draw from all cells."""

    family = "grid_nav"
    on_device = True

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (len(CELLS),), np.float32)
        self.action_space = Discrete(len(MOVES))
        self.max_episode_steps = HORIZON
        self.episodes_per_trial = config.episodes

    def make_vec(self, num_envs: int) -> GridNavVectorEnv:
        """A vector environment whose columns play grids."""
        return GridNavVectorEnv(num_envs)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n goals of a split."""
        goal = split_stream(rng, split).choice(self.goals(split), n).astype(np.float64)
        return make_tasks(self.family, split, {"goal": goal})

    def goals(self, split: Split) -> np.ndarray:
        """Goal cells of a split; which are held out is the same in every run."""
        return np.asarray(GOALS[drawn_from(len(GOALS), self.config.held_out, split)])

    def reference(self, task: Task) -> Reference:
        """Both ends averaged over all goals, since the oracle is optimal on average only."""
        return _reference(self.config.episodes)


@lru_cache(maxsize=4)
def _reference(episodes: int) -> Reference:
    return Reference(random_return(episodes), bayes_return(episodes))


def random_return(episodes: int) -> np.ndarray:
    """(E,) expected return of uniformly random moves, averaged over the goals; exact."""
    at = np.zeros(len(CELLS))
    at[0] = 1.0
    visits = np.zeros(len(CELLS))
    for _ in range(HORIZON):
        spread = np.zeros(len(CELLS))
        np.add.at(spread, NEXT_CELL, np.repeat(at[:, None] / len(MOVES), len(MOVES), axis=1))
        at = spread
        visits += at
    return np.full(episodes, (1.1 * visits[GOALS] - 0.1 * HORIZON).mean())


def bayes_return(episodes: int) -> np.ndarray:
    """(E,) the Bayes-optimal return, averaged over the goals; exact.

    Reaching a goal at step t and staying earns 16 - t - (t - 1) / 10. No walk can meet a goal
    before step 2 or two goals at once, so that the first episode meets at most 14 of the 21, at
    steps 2 to 15. No episode can beat walking straight to a known goal. One policy attains both
    bounds: a first sweep over 14 cells whose remaining 7 lie on one shortest path.
    """

    def earned(step: np.ndarray) -> np.ndarray:
        return np.asarray(HORIZON + 1 - step - 0.1 * (step - 1))

    first = (earned(np.arange(2, HORIZON + 1)).sum() - 7 * 0.1 * HORIZON) / len(GOALS)
    known = earned(CELLS[GOALS].sum(axis=1)).mean()
    return np.array([first] + [known] * (episodes - 1))
