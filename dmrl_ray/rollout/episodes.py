"""Episode statistics of a sampler: which episodes are open, and the rows of those that ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmrl_ray.types import Arrays, Columns, Task, tasks_from_array


@dataclass(frozen=True)
class Open:
    """The open episode of each environment (B,): its task, number and length so far."""

    task: np.ndarray
    number: np.ndarray
    length: np.ndarray


class Episodes:
    """The open episodes of B environments, and rows of those that ended.

    An episode's number counts from the start of its environment's trial. Experience is the steps
    and episodes of an agent on a task before an episode began, in all environments in which it
    acts. Counters are kept for each task of each agent, in accounts.

    Attributes:
        playing: (B,) bool, environments with episodes left to play; the others are masked.
        unlimited: no quota of episodes is set.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.number = np.zeros(num_envs, np.int64)
        self._rows: list[dict[str, Any]] = []
        self._adaptation_steps: np.ndarray | None = np.zeros(num_envs, np.int64)
        self.begin_collection()
        self._open_accounts()
        self.begin_trial()
        self.begin_episodes(np.empty(num_envs, object))

    def begin_collection(self, updates: int = 0) -> None:
        """Begin a collection; rows that were not taken are dropped.

        Args:
            updates: of the agents' policy on the tasks that they play.
        """
        self._rows = []
        self._updates = updates

    def _open_accounts(self) -> None:
        """Agents have no experience of any task."""
        self._accounts: dict[tuple[int, str], int] = {}
        # Steps and episodes of each account; the first belongs to no agent.
        self._totals: np.ndarray = np.zeros((2, 1), np.int64)
        self._account: np.ndarray = np.zeros(self.num_envs, np.int64)
        self._next = self._account
        self._length: np.ndarray = np.zeros(self.num_envs, np.int64)

    def assign(self, tasks: Sequence[Task], agent: np.ndarray | None) -> None:
        """Set the tasks (B,) that environments play from their next episodes on.

        Args:
            tasks: of the environments.
            agent: (B,) whose experience is kept until a trial begins; None is one agent in all
                environments, whose stream of tasks is unbounded: the account of a task ends when
                no environment plays it.
        """
        if agent is None:
            agent = np.zeros(self.num_envs, np.int64)
            self._close_accounts()
        self._agent = agent
        keys = list(zip(agent.tolist(), (task.id for task in tasks), strict=True))
        opened = [key for key in dict.fromkeys(keys) if key not in self._accounts]
        self._accounts |= {key: self._totals.shape[1] + i for i, key in enumerate(opened)}
        self._totals = np.pad(self._totals, [(0, 0), (0, len(opened))])
        self._next = np.array([self._accounts[key] for key in keys])

    def begin_trial(self) -> None:
        """Count episodes from 0 again, and experience unless agents have had updates from it."""
        self.number = np.zeros(self.num_envs, np.int64)
        if not self._updates:
            self._open_accounts()

    def begin_episodes(
        self, task_of: np.ndarray, quota: int | None = None, *, forget: bool = True
    ) -> None:
        """Every environment starts an episode on its task; what was open is dropped.

        Args:
            task_of: (B,) tasks.
            quota: episodes of each environment that count from here on; None is all.
            forget: memory is reset, too.
        """
        if forget:
            self._first_in_memory = self.number.copy()  # Episodes that are not in memory.
        self._totals[0] += self._sums(self._length)
        self._account = self._next.copy()
        self._task_of = task_of.copy()
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)
        self._success = np.full(self.num_envs, np.nan)
        envs = np.arange(self.num_envs)
        self._experience_steps, self._experience_episodes = self._experience(envs)
        self._step_before = self._adaptation_step(envs)
        self.set_quota(quota)

    def set_quota(self, quota: int | None) -> None:
        """Set how many episodes of each environment count from here on; None is all."""
        self.unlimited = quota is None
        self._episodes_left = np.full(self.num_envs, 1 if quota is None else quota)
        self.playing = np.ones(self.num_envs, np.bool_)
        self.all_playing = self.any_playing = True

    def steps_left(self, longest: int, num_steps: int | None) -> int:
        """Steps until every environment has played its episodes, but not above `num_steps`.

        Args:
            longest: steps of an episode at most.
            num_steps: needed where no quota was set.
        """
        if self.unlimited:
            assert num_steps is not None, "there is no quota of episodes"
            return num_steps
        left = int(((self._episodes_left * longest - self._length) * self.playing).max())
        return left if num_steps is None else min(left, num_steps)

    def set_adaptation_step(self, adaptation_step: np.ndarray | int | None) -> None:
        """Set the adaptation steps (B,) of this trial; None counts the episodes in memory."""
        none = adaptation_step is None
        self._adaptation_steps = None if none else np.full(self.num_envs, adaptation_step)
        fresh = np.flatnonzero(self._length == 0)
        self._step_before[fresh] = self._adaptation_step(fresh)

    def _adaptation_step(self, envs: np.ndarray) -> np.ndarray:
        """Updates and adaptation steps on their tasks before episodes that begin in `envs`."""
        since = (
            self.number - self._first_in_memory
            if self._adaptation_steps is None
            else self._adaptation_steps
        )
        return np.asarray(since[envs] + self._updates)

    def add_reward(self, reward: np.ndarray, steps: int = 1) -> None:
        """Add the reward (B,) of one step, or of several, to the returns."""
        if self.all_playing:
            self._return += reward
            self._length += steps
        else:
            self._return += reward * self.playing
            self._length += steps * self.playing

    def add_success(self, success: np.ndarray) -> None:
        """Add whether steps (B,) were a success; an episode is one if any of its steps was."""
        self._success = np.fmax(self._success, success)

    def end_episodes(
        self, ended: np.ndarray, step: int, task_of: np.ndarray, *, greedy: bool
    ) -> None:
        """Add rows of the episodes that ended with this step, and begin the next on `task_of`.

        Args:
            ended: indices of their environments.
            step: steps of an environment since the collection began, this one included.
            task_of: (B,) tasks.
            greedy: the most probable actions were taken.
        """
        if not self.all_playing:
            ended = ended[self.playing[ended]]
        number = self.number[ended]
        self._rows.append(
            {
                "task": self._task_of[ended],
                "environment": ended,
                "episode": number,
                "adaptation_step": self._step_before[ended],
                "experience_steps": self._experience_steps[ended],
                "experience_episodes": self._experience_episodes[ended],
                "return": self._return[ended],
                "length": self._length[ended],
                "success": self._success[ended],
                "greedy": np.full(len(ended), greedy),
                "step": np.full(len(ended), step),
            }
        )
        self.number[ended] += 1
        over = np.zeros(self.num_envs, np.bool_)
        over[ended] = True
        self._totals += self._sums(self._length * over), self._sums(over)
        for of_episode, start in ((self._return, 0), (self._length, 0), (self._success, np.nan)):
            of_episode[ended] = start
        self._account[ended] = self._next[ended]
        self._task_of[ended] = task_of[ended]
        had = self._experience(ended)
        self._experience_steps[ended], self._experience_episodes[ended] = had
        self._step_before[ended] = self._adaptation_step(ended)
        if not self.unlimited:
            self._episodes_left[ended] -= 1
            self.playing = self._episodes_left > 0
            self.all_playing, self.any_playing = bool(self.playing.all()), bool(self.playing.any())

    def _experience(self, envs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps and episodes so far on these environments' tasks, parallel copies included."""
        steps, episodes = self._totals[0] + self._sums(self._length), self._totals[1]
        return steps[self._account[envs]], episodes[self._account[envs]]

    def _sums(self, x: np.ndarray) -> np.ndarray:
        """Sums for each account of whole numbers (B,) of the environments."""
        return np.bincount(self._account, x, self._totals.shape[1]).astype(np.int64)

    def _close_accounts(self) -> None:
        """Keep the accounts of tasks that are being played."""
        kept = np.unique(np.append(0, self._account))
        self._account = np.searchsorted(kept, self._account)
        number = {old: new for new, old in enumerate(kept.tolist())}
        self._accounts = {key: number[a] for key, a in self._accounts.items() if a in number}
        self._totals = self._totals[:, kept]

    def open_tasks(self) -> list[Task]:
        """Tasks of the open episodes that have a step."""
        tasks: list[Task] = self._task_of[self._length > 0].tolist()
        return tasks

    def open(self) -> Open:
        """A copy of the open episodes."""
        return Open(self._task_of.copy(), self.number.copy(), self._length.copy())

    def take(self) -> Columns:
        """Rows of the episodes that ended since the last call, in the order they ended."""
        rows, self._rows = self._rows, []
        return {k: np.concatenate([r[k] for r in rows]) if rows else np.empty(0) for k in _ROW}

    def task_at(self, step: int, env: int) -> Task:
        """The task of an environment in this step of the collection."""
        for rows in self._rows:
            if env in rows["environment"] and rows["step"][0] > step:
                task: Task = rows["task"][rows["environment"].tolist().index(env)]
                return task
        now: Task = self._task_of[env]
        return now

    def overdue(self, limit: int) -> tuple[int, int, Task] | None:
        """Environment, steps so far and task of an episode still open after `limit` steps."""
        if not (self._length >= limit).any():
            return None
        env = int(self._length.argmax())
        return env, int(self._length[env]), self._task_of[env]

    def get_state(self) -> Arrays:
        """All that the open episodes depend on, by its names in checkpoints."""
        return {name: getattr(self, attribute) for name, attribute in _STATE.items()}

    def set_state(self, state: Arrays, tasks: Sequence[Task]) -> None:
        """Continue from `get_state`'s answer; tasks (B,) are those of the next episodes."""
        for name, attribute in _STATE.items():
            setattr(self, attribute, np.array(state[name]))
        self._task_of = np.empty(self.num_envs, object)
        self._task_of[:] = tasks_from_array(state["task_of"])
        ids = [task.id for task in (*self._task_of, *tasks)]
        keys = zip(np.tile(self._agent, 2).tolist(), ids, strict=True)
        accounts = np.append(self._account, self._next).tolist()
        self._accounts = dict(zip(keys, accounts, strict=True))
        self.set_quota(None)


_STATE = {
    "episode": "number",
    "return": "_return",
    "length": "_length",
    "success": "_success",
    "agent": "_agent",
    "account": "_account",
    "next_account": "_next",
    "had": "_totals",
    "forgot": "_first_in_memory",
    "experience_steps": "_experience_steps",
    "experience_episodes": "_experience_episodes",
    "step_before": "_step_before",
    "task_of": "_task_of",
}
"""Attributes that open episodes depend on, by their names in checkpoints."""

_ROW = (
    "task",
    "environment",
    "episode",
    "adaptation_step",
    "experience_steps",
    "experience_episodes",
    "return",
    "length",
    "success",
    "greedy",
    "step",
)
