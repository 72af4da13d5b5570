"""Episode statistics of a sampler: which episodes are open, and the rows of those that ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmrl_ray.types import Arrays, Columns, Task, tasks_from_array


@dataclass(frozen=True)
class Open:
    """Episodes that are going on: of each environment (B,) its task, number and length so far."""

    task: np.ndarray
    number: np.ndarray
    length: np.ndarray


class Episodes:
    """The open episodes of B environments, and what is known of those that ended.

    An episode's number counts from the start of its environment's trial. Experience is what the
    agent has had on a task before an episode began, in all environments that play the task.

    Attributes:
        playing: (B,) bool, environments whose steps count: they have episodes left to play.
        unlimited: no environment was told how many episodes to play.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.number = np.zeros(num_envs, np.int64)
        self._rows: list[dict[str, Any]] = []
        self._group = np.arange(num_envs)
        self._now: np.ndarray | None = np.zeros(num_envs, np.int64)
        self._changes = np.zeros(num_envs, np.bool_)
        self._begin_counts()
        self.begin(np.empty(num_envs, object))

    def clear(self) -> None:
        """Forget the rows that nobody took."""
        self._rows = []

    def assign(self, tasks: Sequence[Task], group: np.ndarray) -> None:
        """Environments that play one task share a group (B,); tasks are taken at episode starts."""
        self._group = group
        now = self._task_of.tolist()
        self._changes = np.array(
            [a is not None and a.id != b.id for a, b in zip(now, tasks, strict=True)], np.bool_
        )

    def begin_trial(self) -> None:
        """Count episodes and experience from 0 again."""
        self.number = np.zeros(self.num_envs, np.int64)
        self._begin_counts()

    def _begin_counts(self) -> None:
        self._had_steps, self._had_episodes = np.zeros((2, self.num_envs), np.int64)
        self._length = np.zeros(self.num_envs, np.int64)

    def begin(self, task_of: np.ndarray, quota: int | None = None) -> None:
        """Every environment starts an episode on its task; what was open is dropped.

        Args:
            task_of: (B,) tasks.
            quota: episodes of each environment that count from here on; None is all.
        """
        self._had_steps += self._length
        self._switch(np.flatnonzero(self._changes))
        self._task_of = task_of.copy()
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)
        self._success = np.full(self.num_envs, np.nan)
        everyone = np.arange(self.num_envs)
        self._experience_steps, self._experience_episodes = self._experience(everyone)
        self._step_before = np.zeros(self.num_envs, np.int64)
        self.limit(quota)

    def limit(self, quota: int | None) -> None:
        """How many episodes of each environment count from here on; None is all."""
        self.unlimited = quota is None
        self._left = np.full(self.num_envs, 1 if quota is None else quota)
        self.playing = np.ones(self.num_envs, np.bool_)
        self.all_playing = self.any_playing = True

    def steps_left(self, longest: int) -> int:
        """Steps until every environment has played its episodes, at most `longest` each."""
        return int(((self._left * longest - self._length) * self.playing).max())

    def adapted(self, adaptation_step: np.ndarray | int | None) -> None:
        """Agents have adapted so often before what comes, (B,); None counts their episodes."""
        none = adaptation_step is None
        self._now = None if none else np.full(self.num_envs, adaptation_step)
        fresh = self._length == 0
        self._step_before[fresh] = (self.number if self._now is None else self._now)[fresh]

    def add(self, reward: np.ndarray, steps: int = 1) -> None:
        """Reward of one step, or several, of every environment."""
        if self.all_playing:
            self._return += reward
            self._length += steps
        else:
            self._return += reward * self.playing
            self._length += steps * self.playing

    def see(self, success: np.ndarray) -> None:
        """Whether these steps were a success; an episode is one if any of its steps was."""
        self._success = np.fmax(self._success, success)

    def end(self, ended: np.ndarray, step: int, task_of: np.ndarray, *, greedy: bool) -> None:
        """Episodes ended in these environments with this step; the next are on `task_of`.

        Args:
            ended: indices.
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
                "column": ended,
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
        self._had_steps[ended] += self._length[ended]
        self._had_episodes[ended] += 1
        for of_episode, start in ((self._return, 0), (self._length, 0), (self._success, np.nan)):
            of_episode[ended] = start
        self._switch(ended[self._changes[ended]])
        self._task_of[ended] = task_of[ended]
        had = self._experience(ended)
        self._experience_steps[ended], self._experience_episodes[ended] = had
        self._step_before[ended] = (self.number if self._now is None else self._now)[ended]
        if not self.unlimited:
            self._left[ended] -= 1
            self.playing = self._left > 0
            self.all_playing, self.any_playing = bool(self.playing.all()), bool(self.playing.any())

    def _switch(self, columns: np.ndarray) -> None:
        """These environments take another task, of which nothing is known."""
        if len(columns):
            self._had_steps[columns] = 0
            self._had_episodes[columns] = 0
            self._changes[columns] = False

    def _experience(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps and episodes so far on these environments' tasks, parallel copies included."""
        if self._group[-1] == self.num_envs - 1:  # Groups are numbered without gaps: one each.
            return self._had_steps[columns], self._had_episodes[columns]
        had = (self._had_steps + self._length, self._had_episodes)
        steps, episodes = (np.bincount(self._group, x).astype(np.int64) for x in had)
        return steps[self._group[columns]], episodes[self._group[columns]]

    def begun(self) -> list[Task]:
        """Tasks of the open episodes that have steps."""
        tasks: list[Task] = self._task_of[self._length > 0].tolist()
        return tasks

    def open(self) -> Open:
        """Copies of what is known of the open episodes."""
        return Open(self._task_of.copy(), self.number.copy(), self._length.copy())

    def take(self) -> Columns:
        """Rows of the episodes that ended since the last call, in the order they ended."""
        rows, self._rows = self._rows, []
        return {k: np.concatenate([r[k] for r in rows]) if rows else np.empty(0) for k in _ROW}

    def task_at(self, step: int, column: int) -> Task:
        """What an environment played in this step of the collection."""
        for rows in self._rows:
            if column in rows["column"] and rows["step"][0] > step:
                task: Task = rows["task"][rows["column"].tolist().index(column)]
                return task
        now: Task = self._task_of[column]
        return now

    def overdue(self, limit: int) -> tuple[int, int, Task] | None:
        """Environment, steps so far and task of an episode that goes on after `limit` steps."""
        if not (self._length >= limit).any():
            return None
        column = int(self._length.argmax())
        return column, int(self._length[column]), self._task_of[column]

    def get_state(self) -> Arrays:
        """Of the open episodes."""
        return {name: getattr(self, attribute) for name, attribute in _STATE.items()}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        for name, attribute in _STATE.items():
            setattr(self, attribute, np.array(state[name]))
        self._task_of = np.empty(self.num_envs, object)
        self._task_of[:] = tasks_from_array(state["task_of"])
        self.limit(None)


_STATE = {
    "episode": "number",
    "return": "_return",
    "length": "_length",
    "success": "_success",
    "had_steps": "_had_steps",
    "had_episodes": "_had_episodes",
    "experience_steps": "_experience_steps",
    "experience_episodes": "_experience_episodes",
    "step_before": "_step_before",
    "task_changes": "_changes",
    "group": "_group",
    "task_of": "_task_of",
}
"""Attributes (B,) that open episodes depend on, by their names in checkpoints."""

_ROW = (
    "task",
    "column",
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
