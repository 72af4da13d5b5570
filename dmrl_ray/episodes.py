"""The books of a sampler: which episodes are open, and the rows of those that ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dmrl_ray.types import Arrays, Columns, Task, tasks_from_array


@dataclass(frozen=True)
class Open:
    """Episodes that are going on: of each column (B,) its task, number and length so far."""

    task: np.ndarray
    number: np.ndarray
    length: np.ndarray


class Episodes:
    """The open episodes of B columns, and what is known of those that ended.

    An episode's number counts from the start of its column's trial; `since_begun` counts from
    the last time that all columns were reset together.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.number = np.zeros(num_envs, np.int64)
        self._rows: list[dict[str, Any]] = []
        self.begin(np.empty(num_envs, object))

    def clear(self) -> None:
        """Forget the rows that nobody took."""
        self._rows = []

    def begin_trial(self) -> None:
        """Count from 0 again."""
        self.number = np.zeros(self.num_envs, np.int64)

    def begin(self, task_of: np.ndarray) -> None:
        """Every column starts an episode on its task; what was open is dropped."""
        self._task_of = task_of.copy()
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)
        self._begun_at = self.number.copy()

    def add(self, reward: np.ndarray, steps: int = 1) -> None:
        """What one step, or several, of every column paid."""
        self._return += reward
        self._length += steps

    def end(
        self,
        ended: np.ndarray,
        step: int,
        adaptation_step: int | None,
        success: np.ndarray | None,
        task_of: np.ndarray,
    ) -> None:
        """Episodes ended in these columns with this step; the next are on `task_of`.

        Args:
            step: steps of a column since the collection began, this one included.
            adaptation_step: None where it is the number of the episode.
        """
        number = self.number[ended]
        self._rows.append(
            {
                "task": self._task_of[ended],
                "column": ended,
                "episode": number,
                "since_begun": number - self._begun_at[ended],
                "adaptation_step": number
                if adaptation_step is None
                else np.full(len(ended), adaptation_step),
                "return": self._return[ended],
                "length": self._length[ended],
                "success": np.full(len(ended), np.nan) if success is None else success[ended] * 1.0,
                "step": np.full(len(ended), step),
            }
        )
        self.number[ended] += 1
        self._return[ended] = 0.0
        self._length[ended] = 0
        self._task_of[ended] = task_of[ended]

    def open(self) -> Open:
        """Copies of what is known of the open episodes."""
        return Open(self._task_of.copy(), self.number.copy(), self._length.copy())

    def take(self) -> Columns:
        """Rows of the episodes that ended since the last call, in the order they ended."""
        rows, self._rows = self._rows, []
        return {k: np.concatenate([r[k] for r in rows]) if rows else np.empty(0) for k in _ROW}

    def task_at(self, step: int, column: int) -> Task:
        """What a column played in this step of the collection."""
        for rows in self._rows:
            if column in rows["column"] and rows["step"][0] > step:
                task: Task = rows["task"][rows["column"].tolist().index(column)]
                return task
        now: Task = self._task_of[column]
        return now

    def overdue(self, limit: int) -> tuple[int, int, Task] | None:
        """Column, steps so far and task of an episode that goes on after `limit` steps."""
        if not (self._length >= limit).any():
            return None
        column = int(self._length.argmax())
        return column, int(self._length[column]), self._task_of[column]

    def get_state(self) -> Arrays:
        """Of the open episodes."""
        return {
            "episode": self.number,
            "begun_at": self._begun_at,
            "return": self._return,
            "length": self._length,
            "task_of": self._task_of,
        }

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.number, self._begun_at, self._return, self._length = (
            np.array(state[name]) for name in ("episode", "begun_at", "return", "length")
        )
        self._task_of = np.empty(self.num_envs, object)
        self._task_of[:] = tasks_from_array(state["task_of"])


_ROW = (
    "task",
    "column",
    "episode",
    "since_begun",
    "adaptation_step",
    "return",
    "length",
    "success",
    "step",
)
