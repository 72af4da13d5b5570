"""A grid with a hidden goal cell, to be found in the first episode and revisited in the others.

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
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_indices, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import SPLITS, Array, Split, Task

from .belief import BeliefVectorEnv

SIZE = 5
HORIZON = 15

CELLS = np.array([(x, y) for y in range(SIZE) for x in range(SIZE)])
"""Coordinates of cell x + SIZE * y."""

GOALS = np.flatnonzero((CELLS >= 2).any(axis=1))
"""The 21 cells outside the 2 x 2 corner around the start, cell 0."""

MOVES = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
"""Stay and the four moves; a move off the grid has no effect."""

_target = np.clip(CELLS[:, None] + MOVES, 0, SIZE - 1)
NEXT_CELL: np.ndarray = _target[..., 0] + SIZE * _target[..., 1]
"""(cells, actions), the transitions."""

DISTANCE: np.ndarray = np.abs(CELLS[:, None] - CELLS).sum(axis=-1)
"""(cells, cells), steps from one to another."""

TOWARDS: np.ndarray = DISTANCE[NEXT_CELL].argmin(axis=1)
"""(cells, cells), the first action of a shortest path: along x before y, and 0 at its end."""

SWEEP = np.array([10, 15, 20, 21, 16, 11, 12, 7, 8, 13, 18, 17, 22, 23, 2, 3, 4, 9, 14, 19, 24])
"""All goals: 14 that one episode can visit from its second step on, then 7 that lie on one shortest
path along two sides."""


class GridNavVectorEnv(BeliefVectorEnv):
    """Grids with a hidden goal.

    * Observation: (25,) the agent's cell, one-hot.
    * Action: 0 stay, 1 right, 2 left, 3 up, 4 down.
    * Reward: 1 if the agent is on the goal after the move, else -0.1. The goal does not end the
      episode.
    * End: truncated after 15 steps; ``success`` where the agent is on the goal.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("cell", "goal", "next_goal", "t")
    constant_fields: ClassVar[tuple[str, ...]] = ("_next_cell", "_one_hot")
    belief_fields: ClassVar[tuple[str, ...]] = ("possible", "split")

    def __init__(self, num_envs: int, searches: Mapping[Split, tuple[int, ...]] | None = None):
        """`searches` are the goals of each split in the order of `search`, by default all goals."""
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
        self.split = np.zeros(num_envs, np.int64)  # of the latest tasks, as indices into `SPLITS`
        self.possible = self._goals[self.split]  # (B, cells), where the goal may be
        self._next_cell = NEXT_CELL
        self._one_hot = np.eye(len(CELLS), dtype=np.float32)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_goal[:] = self.array([task.params["goal"] for task in tasks])
        self.split = np.array([SPLITS.index(task.split) for task in tasks])

    def begin(self, env_ids: Array) -> None:
        """Starts episodes in the start cell."""
        super().begin(env_ids)
        self.cell[env_ids] = 0
        self.goal[env_ids] = self.next_goal[env_ids]
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets all goals of the tasks' splits to possible."""
        self.possible[env_ids] = self._goals[self.split[env_ids]]

    def observe(self) -> Array:
        """Returns one-hot cells (B, 25)."""
        return self.take_rows(self._one_hot, self.cell)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Moves every agent."""
        self.cell = self._next_cell[self.cell, actions]
        found = self.cell == self.goal
        reward = self.xp.where(found, np.float32(1.0), np.float32(-0.1))
        if self.tracks_belief:
            self.possible[self.env_ids, self.cell] = found
            self.possible[found] = self._one_hot[self.cell[found]] > 0
        self.t += 1
        truncated = self.t >= HORIZON
        obs, infos = self.auto_reset(self.observe(), truncated)
        infos["success"] = found
        return obs, reward, self.all_false, truncated, infos

    def belief(self) -> np.ndarray:
        """Returns each cell's probability of being the goal, and whether it is known, (B, 26)."""
        count = self.possible.sum(axis=1, keepdims=True)
        return np.concatenate([self.possible / count, count == 1], axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """Returns moves (B,) towards the possible goals of the lowest `search_rank`.

        From the start cell this is the policy of `reference`.
        """
        rank = np.where(self.possible, self._rank[self.split, self.cell], self._rank.max() + 1)
        return np.asarray(TOWARDS[self.cell, rank.argmin(axis=1)])

    def best_action(self) -> np.ndarray:
        """Returns moves towards the goals (B,)."""
        return np.asarray(TOWARDS[self.cell, self.goal])

    def render(self) -> Array:
        """Draws the grid with the goal in green and the agent in black."""
        image = np.full((SIZE, SIZE, 3), 255, np.uint8)
        image[tuple(CELLS[self.goal[0]][::-1])] = (40, 160, 60)
        image[tuple(CELLS[self.cell[0]][::-1])] = (0, 0, 0)
        return image[::-1].repeat(8, axis=0).repeat(8, axis=1)


def search_rank(order: tuple[int, ...]) -> np.ndarray:
    """Returns, for each cell, the rank of every goal as the next to visit, (cells, cells).

    It is the rank in the order. Where the order holds all goals they are ranked by distance first,
    which is the same from the start, and wastes fewer steps from elsewhere.
    """
    rank: np.ndarray = len(CELLS) * DISTANCE * (len(order) == len(GOALS))
    rank[:, order] += np.arange(len(order))
    return rank


class GridNav(TaskDistribution):
    """Goals, uniform over the 21 cells that are not near the start.

    By default all splits share all cells, as in VariBAD: the agent learns to search, with few tasks
    to generalize over. `held_out` reserves cells for the other splits; a belief is then a
    distribution over the cells of the task's split.
    """

    class Config(Settings):
        """The length of trials and the held-out goals."""

        episodes: Number = 4
        """The number of episodes in a trial."""

        held_out: int = Field(default=0, ge=0, le=10)
        """The number of goal cells held out for validation, and as many others for test; with 0 all
        splits share all cells."""

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
        """Returns a vector environment of grids."""
        return GridNavVectorEnv(num_envs, self._searches)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n goals of a split."""
        goal = split_stream(rng, split).choice(self.goals(split), n).astype(np.float64)
        return make_tasks(self.family, split, {"goal": goal})

    def goals(self, split: Split) -> np.ndarray:
        """Returns the goal cells of a split, which are the same in every run."""
        return np.asarray(GOALS[split_indices(len(GOALS), self.config.held_out, split)])

    def reference(self, task: Task) -> Reference:
        """Returns the reference returns averaged over the goals of the task's split.

        The oracle knows the split's goals but not which is the task's: see `search`.
        """
        return _reference(self._searches[task.split], self.config.episodes)


@lru_cache(maxsize=4)
def _reference(order: tuple[int, ...], episodes: int) -> Reference:
    return Reference(
        random_return(episodes, np.array(order)), search_returns(order, episodes).mean(axis=1)
    )


def random_return(episodes: int, goals: np.ndarray = GOALS) -> np.ndarray:
    """Computes the expected return of uniformly random moves, averaged over the goals, (E,)."""
    prob = np.zeros(len(CELLS))
    prob[0] = 1.0
    visits = np.zeros(len(CELLS))
    for _ in range(HORIZON):
        next_prob = np.zeros(len(CELLS))
        np.add.at(next_prob, NEXT_CELL, np.repeat(prob[:, None] / len(MOVES), len(MOVES), axis=1))
        prob = next_prob
        visits += prob
    return np.full(episodes, (1.1 * visits[goals] - 0.1 * HORIZON).mean())


def search_returns(order: tuple[int, ...], episodes: int) -> np.ndarray:
    """Computes the returns (E, goals) of visiting goals in order until the task's is found.

    Reaching the goal at step t and staying there has the return 16 - t - (t - 1) / 10.
    """
    returns = np.full((episodes, len(order)), -0.1 * HORIZON)
    unvisited = dict(zip(order, range(len(order)), strict=True))
    for episode in range(episodes):
        cell, t = 0, 0
        while unvisited and t < HORIZON:
            cell, t = int(NEXT_CELL[cell, TOWARDS[cell, next(iter(unvisited))]]), t + 1
            if cell in unvisited:
                i = unvisited.pop(cell)
                returns[episode, i] = _goal_return(t)
                returns[episode + 1 :, i] = _goal_return(int(DISTANCE[0, cell]))
    return returns


def _goal_return(step: int) -> float:
    return HORIZON + 1 - step - 0.1 * (step - 1)


@cache
def search(goals: tuple[int, ...], episodes: int) -> tuple[int, ...]:
    """Returns the order of visiting these goals that has the highest mean return over them.

    For all 21 it is `SWEEP`, which is Bayes-optimal: no walk can visit a goal before step 2 or two
    goals at once, so that the first episode visits at most 14 of the 21, at steps 2 to 15, and no
    later episode can be better than the shortest path to a known goal. `SWEEP` attains both bounds.

    For fewer it is found by local search, from the nearest-neighbor order, over reversals, swaps
    and moves. For every split that `held_out` makes it is Bayes-optimal too, as an exhaustive
    search over all walks shows.
    """
    remaining = [goal for goal in SWEEP.tolist() if goal in goals]
    if len(remaining) == len(SWEEP):
        return tuple(remaining)
    best: tuple[int, ...] = ()
    while remaining:
        cell = best[-1] if best else 0
        nearest = min(remaining, key=lambda goal, cell=cell: int(DISTANCE[cell, goal]))  # type: ignore[misc]
        remaining.remove(nearest)
        best = (*best, nearest)

    def value(order: tuple[int, ...]) -> float:
        return float(search_returns(order, episodes).sum())

    while True:
        better = max(_neighbors(best), key=value, default=best)
        if value(better) <= value(best) + 1e-9:
            return best
        best = better


def _neighbors(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the orders with a part reversed, two goals swapped, or up to three in a row moved."""
    for i in range(len(order)):
        for j in range(i + 2, len(order) + 1):
            first, *inside, last = order[i:j]
            yield (*order[:i], *order[i:j][::-1], *order[j:])
            yield (*order[:i], last, *inside, first, *order[j:])
        for size in (1, 2, 3):
            part, rest = order[i : i + size], order[:i] + order[i + size :]
            for k in range(len(rest) + 1):
                yield (*rest[:k], *part, *rest[k:])
