"""A grid with a hidden goal cell: search it in the first episode, go there in the others.

VariBAD's GridNavi (Zintgraf et al. 2020, arXiv:1910.08348, sec. 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, drawn_from, make_tasks, split_stream
from dmrl_ray.types import SPLITS, Array, Reference, Split, Task

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
    memory_fields: ClassVar[tuple[str, ...]] = ("possible", "split")

    def __init__(self, num_envs: int, searches: Mapping[Split, tuple[int, ...]] | None = None):
        """Searches are the goals of each split, as `search` orders them; all of them by default."""
        super().__init__(num_envs, Box(0.0, 1.0, (len(CELLS),), np.float32), Discrete(len(MOVES)))
        self.cell = np.zeros(num_envs, np.int64)
        self.goal = np.full(num_envs, GOALS[-1])
        self.next_goal = self.goal.copy()
        self.t = np.zeros(num_envs, np.int64)
        searches = searches or dict.fromkeys(SPLITS, tuple(SWEEP))
        self._rank = np.stack([search_rank(searches[split]) for split in SPLITS])
        self._goals = np.zeros((len(SPLITS), len(CELLS)), np.bool_)
        for i, split in enumerate(SPLITS):
            self._goals[i, list(searches[split])] = True
        self.split = np.zeros(num_envs, np.int64)  # of the tasks last set, into `SPLITS`
        self.possible = self._goals[self.split]  # (B, cells) where the goal may be
        self._next_cell = NEXT_CELL
        self._one_hot = np.eye(len(CELLS), dtype=np.float32)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_goal[:] = self.array([task.params["goal"] for task in tasks])
        self.split = np.array([SPLITS.index(task.split) for task in tasks])

    def begin(self, columns: Array) -> None:
        """Put the agents of these columns on the start."""
        super().begin(columns)
        self.cell[columns] = 0
        self.goal[columns] = self.next_goal[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """The goals of these columns may be any of their split."""
        self.possible[columns] = self._goals[self.split[columns]]

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

    def expert_action(self) -> np.ndarray:
        """(B,) the first move towards the cell that may be the goal and is first in `search_rank`.

        From the start this is the policy of `reference`.
        """
        rank = np.where(self.possible, self._rank[self.split, self.cell], self._rank.max() + 1)
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


def search_rank(order: tuple[int, ...]) -> np.ndarray:
    """(cells, cells) from each cell, the rank of every goal as the next to look at.

    It is the order, but among all goals distance comes first: from the start that is the same, and
    from elsewhere it wastes fewer steps.
    """
    rank: np.ndarray = len(CELLS) * DISTANCE * (len(order) == len(GOALS))
    rank[:, order] += np.arange(len(order))
    return rank


class GridNav(TaskDistribution):
    """Goals, uniform over the 21 cells that are not near the start.

    By default every split draws from all of them, as VariBAD does: what is learned is how to
    search, and there is little to generalise over. `held_out` keeps cells for the other splits; a
    belief then is one over the cells of the task's split.
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
        self._searches = {
            split: search(tuple(self.goals(split).tolist()), min(config.episodes, 2))
            for split in SPLITS
        }

    def make_vec(self, num_envs: int) -> GridNavVectorEnv:
        """A vector environment whose columns play grids."""
        return GridNavVectorEnv(num_envs, self._searches)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n goals of a split."""
        goal = split_stream(rng, split).choice(self.goals(split), n).astype(np.float64)
        return make_tasks(self.family, split, {"goal": goal})

    def goals(self, split: Split) -> np.ndarray:
        """Goal cells of a split; which are held out is the same in every run."""
        return np.asarray(GOALS[drawn_from(len(GOALS), self.config.held_out, split)])

    def reference(self, task: Task) -> Reference:
        """Both ends averaged over the goals of the task's split.

        The oracle does not know the goal, but which goals the split has, and is best on their
        average: see `search`.
        """
        return _reference(self._searches[task.split], self.config.episodes)


@lru_cache(maxsize=4)
def _reference(order: tuple[int, ...], episodes: int) -> Reference:
    return Reference(
        random_return(episodes, np.array(order)), search_returns(order, episodes).mean(axis=1)
    )


def random_return(episodes: int, goals: np.ndarray = GOALS) -> np.ndarray:
    """(E,) expected return of uniformly random moves, averaged over the goals; exact."""
    at = np.zeros(len(CELLS))
    at[0] = 1.0
    visits = np.zeros(len(CELLS))
    for _ in range(HORIZON):
        spread = np.zeros(len(CELLS))
        np.add.at(spread, NEXT_CELL, np.repeat(at[:, None] / len(MOVES), len(MOVES), axis=1))
        at = spread
        visits += at
    return np.full(episodes, (1.1 * visits[goals] - 0.1 * HORIZON).mean())


def search_returns(order: tuple[int, ...], episodes: int) -> np.ndarray:
    """(E, goals) returns of who visits the goals in order until one pays, and then knows it; exact.

    Reaching a goal at step t and staying earns 16 - t - (t - 1) / 10.
    """
    returns = np.full((episodes, len(order)), -0.1 * HORIZON)
    unknown = dict(zip(order, range(len(order)), strict=True))
    for episode in range(episodes):
        cell, t, found = 0, 0, []
        while unknown and t < HORIZON:
            cell, t = int(NEXT_CELL[cell, TOWARDS[cell, next(iter(unknown))]]), t + 1
            if cell in unknown:
                found.append(cell)
                i = unknown.pop(cell)
                returns[episode, i] = _earned(t)
                returns[episode + 1 :, i] = _earned(int(DISTANCE[0, cell]))
    return returns


def _earned(step: int) -> float:
    return HORIZON + 1 - step - 0.1 * (step - 1)


@cache
def search(goals: tuple[int, ...], episodes: int) -> tuple[int, ...]:
    """The order in which to look at these goals that is best on their average.

    With all 21 it is `SWEEP`, which is Bayes-optimal: no walk can meet a goal before step 2 or two
    goals at once, so that the first episode meets at most 14 of the 21, at steps 2 to 15, and no
    episode can beat walking straight to a known goal. `SWEEP` attains both bounds.

    With fewer it goes to the nearest of what is left, and improves the order as long as moving,
    reversing or exchanging helps. For every split that `held_out` makes this is Bayes-optimal,
    too, as a search through all walks shows.
    """
    left = [goal for goal in SWEEP.tolist() if goal in goals]
    if len(left) == len(SWEEP):
        return tuple(left)
    best: tuple[int, ...] = ()
    while left:
        cell = best[-1] if best else 0
        nearest = min(left, key=lambda goal, cell=cell: int(DISTANCE[cell, goal]))  # type: ignore[misc]
        left.remove(nearest)
        best = (*best, nearest)

    def value(order: tuple[int, ...]) -> float:
        return float(search_returns(order, episodes).sum())

    while True:
        better = max(_rearranged(best), key=value, default=best)
        if value(better) <= value(best) + 1e-9:
            return best
        best = better


def _rearranged(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Orders with a part reversed, or with two goals exchanged, or with up to three moved."""
    for i in range(len(order)):
        for j in range(i + 2, len(order) + 1):
            first, *inside, last = order[i:j]
            yield (*order[:i], *order[i:j][::-1], *order[j:])
            yield (*order[:i], last, *inside, first, *order[j:])
        for size in (1, 2, 3):
            part, rest = order[i : i + size], order[:i] + order[i + size :]
            for k in range(len(rest) + 1):
                yield (*rest[:k], *part, *rest[k:])
