"""Recorded transitions as batches of sequences, for algorithms that learn from data.

A dataset is a sequence of steps in a fixed order: one history (an environment of a job) after the
other, each in the order of collection. Samples depend on the random generator alone: neither on the
distribution of rows over files nor on earlier reads. Blocks are read on demand and cached up to a
number of bytes.

Each rollout worker reads for its own shards, and learners split what was read: data need not be
split beforehand, as by Ray Data's ``streaming_split``, and there is no reading position to restore.

All numbers are read once before the first sample. A row with a non-finite number is left out, with
the step before it where the row's observation is that step's successor; of units that are sampled
whole, such as episodes or trials, the whole unit is left out. Sequences never continue over a gap.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np

from dmrl_ray.data.files import Block, Source
from dmrl_ray.errors import ConfigError
from dmrl_ray.types import Arrays, Rollout

Unit: TypeAlias = Literal["episode", "trial", "history"]
Segment: TypeAlias = tuple[int, int, bool]
"""First step, end (exclusive), and whether the memory is reset before the first step."""

Spans: TypeAlias = tuple[np.ndarray, np.ndarray]
"""First steps and ends (exclusive)."""

MAX_NAMED = 3
"""Rows with non-finite numbers that a message names; further ones are counted."""


@dataclass(frozen=True)
class LeftOut:
    """Rows left out of the dataset because of non-finite numbers."""

    rows: int
    of: int
    first: tuple[str, ...]  # locations and columns of the first rows

    def __str__(self) -> str:
        more = self.rows - len(self.first)
        rest = f" and {more} more" if more else ""
        return (
            f"{self.rows} of {self.of} rows hold non-finite numbers: {'; '.join(self.first)}{rest}"
        )


class Dataset:
    """Recorded steps in a fixed order, from which sequences are sampled.

    Args:
        source: the recorded blocks.
        obs_space: the observation space of the task family; the data must match it.
        action_space: the action space, likewise.
        memory_bytes: maximum size of the cached blocks.

    Raises:
        ValueError: there are no steps, or they do not match the family.
    """

    def __init__(
        self,
        source: Source,
        obs_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        memory_bytes: int = 256 << 20,
    ) -> None:
        self._source, self._memory_bytes = source, memory_bytes
        self._spaces = (obs_space, action_space)
        self._discrete = isinstance(action_space, gym.spaces.Discrete)
        self._shapes = (tuple(obs_space.shape or ()), tuple(action_space.shape or ()))
        self._obs_dtype = obs_space.dtype
        self._action_dtype = np.int64 if self._discrete else np.float32
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._whole_units: dict[Unit, Spans] = {}
        found = [source.pieces(block) for block in range(source.num_blocks)]
        block = np.repeat(np.arange(len(found)), [len(pieces) for pieces in found])
        pieces = np.concatenate(found) if found else np.empty((0, 7), np.int64)
        if len(pieces) == 0:
            raise ConfigError("data: no steps were recorded; record a stage with record: true")
        self._index(pieces, block)
        self._block(int(self._piece_block[0]))

    def _index(self, pieces: np.ndarray, block: np.ndarray) -> None:
        rank, task_rank = _ranks(self._source.histories), _ranks(self._source.tasks)
        history, trial, episode, t, *_ = pieces.T
        order = np.lexsort((t, episode, trial, rank[history]))
        history, trial, episode, t, task, row, length = pieces[order].T
        block = block[order]
        end = length.cumsum()
        first = end - length
        new = {"history": _changes(history)}
        new["trial"] = new["history"] | _changes(trial)
        # An episode may continue in the next rollout.
        new["episode"] = new["history"] | (t != np.append(0, (t + length)[:-1]))
        self.num_steps = int(end[-1])
        self.starts: dict[str, np.ndarray] = {
            unit: np.append(first[begins], self.num_steps) for unit, begins in new.items()
        }
        self.task_names = sorted(self._source.tasks)
        self._task_of_episode = task_rank[task[new["episode"]]]
        apart = _changes(block)
        apart[1:] |= row[1:] != row[:-1] + length[:-1]
        self._piece_first = np.append(first[apart], self.num_steps)
        self._piece_block, self._piece_row = block[apart], row[apart]

    @cached_property
    def _excluded(self) -> tuple[np.ndarray, LeftOut | None]:
        """Sorted steps that are left out, and their description."""
        found: list[np.ndarray] = []
        named: list[str] = []
        rows = 0
        for block in np.unique(self._piece_block).tolist():
            columns = self._source.not_finite(block)
            if not columns:
                continue
            row = np.flatnonzero(np.logical_or.reduce(list(columns.values())))
            step = self._steps_at(block, row)
            row, step = row[step >= 0], step[step >= 0]
            rows += len(row)
            for r in row[: MAX_NAMED - len(named)].tolist():
                names = ", ".join(name for name, bad in columns.items() if bad[r])
                named.append(f"{self._source.where(block, r)}: {names}")
            found.append(step)
            if "obs" in columns:  # The successor of the step before is unknown.
                unknown = step[columns["obs"][row]]
                found.append(np.setdiff1d(unknown, self.starts["episode"]) - 1)
        if not rows:
            return np.empty(0, np.int64), None
        return np.unique(np.concatenate(found)), LeftOut(rows, self.num_steps, tuple(named))

    @property
    def left_out(self) -> LeftOut | None:
        """Rows left out; None if there are none."""
        return self._excluded[1]

    @cached_property
    def _segments(self) -> Spans:
        """Maximal parts of episodes in which no step is left out."""
        excluded = self._excluded[0]
        cuts = np.unique(np.concatenate([self.starts["episode"], excluded, excluded + 1]))
        begin, end = cuts[:-1], cuts[1:]
        valid = ~np.isin(begin, excluded)
        if not valid.any():
            raise ConfigError(f"data: nothing is left to learn from: {self.left_out}")
        return begin[valid], end[valid]

    @cached_property
    def _segment_ends(self) -> np.ndarray:
        """Cumulative numbers of steps of the segments."""
        begin, end = self._segments
        ends: np.ndarray = (end - begin).cumsum()
        return ends

    @cached_property
    def _task_of(self) -> np.ndarray:
        """The task of each segment, as an index into `task_names`."""
        episode = np.searchsorted(self.starts["episode"], self._segments[0], "right") - 1
        task: np.ndarray = self._task_of_episode[episode]
        return task

    def _whole(self, unit: Unit) -> Spans:
        """Returns the units in which no step is left out."""
        if unit not in self._whole_units:
            starts = self.starts[unit]
            whole = np.diff(np.searchsorted(self._excluded[0], starts)) == 0
            if not whole.any():
                raise ConfigError(
                    f"data: no {unit} is complete, and only complete ones can be learned from: "
                    f"{self.left_out}"
                )
            self._whole_units[unit] = starts[:-1][whole], starts[1:][whole]
        return self._whole_units[unit]

    @cached_property
    def _history_starts(self) -> np.ndarray:
        """Index of each history's first whole episode, for histories that have one."""
        begin, _ = self._whole("episode")
        return np.unique(np.searchsorted(begin, self.starts["history"]))

    def windows(self, rng: np.random.Generator, num_envs: int, num_steps: int) -> Rollout:
        """Samples windows of consecutive steps, whose first steps are uniform over all steps.

        After a row that is left out, a new sequence begins.
        """
        (begin, end), ends = self._segments, self._segment_ends
        sequences = []
        for start in rng.integers(ends[-1], size=num_envs).tolist():
            segments: list[Segment] = []
            i, left = int(np.searchsorted(ends, start, "right")), num_steps
            at = int(end[i]) - (int(ends[i]) - start)
            while left:
                stop = min(int(end[i]), at + left)
                segments.append((at, stop, True))
                left -= stop - at
                i = (i + 1) % len(begin)
                at = int(begin[i])
            sequences.append(segments)
        return self.rollout(sequences, num_steps)

    def units(self, rng: np.random.Generator, unit: Unit, num_envs: int, num_steps: int) -> Rollout:
        """Samples whole units uniformly and concatenates them; the last of a sequence is cut off.

        Units with a row that is left out are left out as a whole.
        """
        begin, end = self._whole(unit)
        sequences = []
        for _ in range(num_envs):
            segments: list[Segment] = []
            left = num_steps
            while left:
                i = int(rng.integers(len(begin)))
                stop = min(int(end[i]), int(begin[i]) + left)
                segments.append((int(begin[i]), stop, True))
                left -= stop - int(begin[i])
            sequences.append(segments)
        return self.rollout(sequences, num_steps)

    def histories(
        self, rng: np.random.Generator, num_envs: int, num_steps: int, *, every: int
    ) -> Rollout:
        """Samples consecutive episodes of a history, in the order of collection, as one sequence.

        A history that is too short is followed by another sequence. Episodes with a row that is
        left out are left out as a whole.

        Args:
            every: keep every n-th episode of a history, from a random one of the first n.
        """
        sequences = []
        for _ in range(num_envs):
            segments: list[Segment] = []
            left = num_steps
            while left:
                resets = True
                for start, end in self._excerpt(rng, left, every):
                    stop = min(end, start + left)
                    segments.append((start, stop, resets))
                    left, resets = left - (stop - start), False
                    if left == 0:
                        break
            sequences.append(segments)
        return self.rollout(sequences, num_steps)

    def _excerpt(self, rng: np.random.Generator, steps: int, every: int) -> list[tuple[int, int]]:
        """Samples consecutive episodes of one history, with at least `steps` steps if possible."""
        begin, end = self._whole("episode")
        i = int(rng.integers(len(self._history_starts) - 1))
        first, last = self._history_starts[i : i + 2].tolist()
        kept = slice(first + int(rng.integers(min(every, last - first))), last, every)
        begin, end = begin[kept], end[kept]
        enough = (end - begin)[::-1].cumsum()[::-1] >= steps
        start = int(rng.integers(max(1, int(enough.sum()))))
        return list(zip(begin[start:].tolist(), end[start:].tolist(), strict=True))

    def of_tasks(
        self, rng: np.random.Generator, tasks: Sequence[str], num_steps: int, *, newest: float = 1.0
    ) -> Rollout:
        """Samples one sequence per task, of parts of its episodes that begin at a random step.

        Args:
            tasks: names of the tasks.
            num_steps: length of each sequence.
            newest: fraction of each history to sample from, at its end.
        """
        sequences = []
        for task in tasks:
            begin, end = self._segments_of(task, newest)
            ends = (end - begin).cumsum()
            segments: list[Segment] = []
            left = num_steps
            while left:
                at = int(rng.integers(ends[-1]))
                i = int(np.searchsorted(ends, at, "right"))
                start = int(end[i]) - (int(ends[i]) - at)
                stop = min(int(end[i]), start + left)
                segments.append((start, stop, True))
                left -= stop - start
            sequences.append(segments)
        return self.rollout(sequences, num_steps)

    def tasks_of(self, newest: float) -> list[str]:
        """Returns the tasks that `of_tasks` can sample."""
        return [name for name in self.task_names if len(self._segments_of(name, newest)[0])]

    def _segments_of(self, task: str, newest: float) -> Spans:
        """Returns the segments of a task, within the newest part of their histories."""
        (begin, end), histories = self._segments, self.starts["history"]
        mine = np.flatnonzero(self._task_of == self.task_names.index(task))
        begin, end = begin[mine], end[mine]
        of = np.searchsorted(histories, begin, "right")
        size = histories[of] - histories[of - 1]
        begin = np.maximum(begin, histories[of] - np.ceil(size * newest).astype(np.int64))
        kept = begin < end
        return begin[kept], end[kept]

    def rollout(self, sequences: Sequence[Sequence[Segment]], num_steps: int) -> Rollout:
        """Returns a rollout of segments, concatenated per environment, with true successors."""
        num_envs = len(sequences)
        obs_shape, action_shape = self._shapes
        arrays, final = self._gather(sequences, num_steps)
        none = np.full((num_envs, *action_shape), -1 if self._discrete else 0, self._action_dtype)
        where = np.array(list(final), np.int64)
        final_obs = np.stack(list(final.values())).astype(self._obs_dtype)
        obs = arrays.pop("obs").reshape(num_steps + 1, num_envs, *obs_shape)
        unknown = ("log_prob", "value", "next_value", "advantage", "value_target")
        return Rollout(
            task_index=np.zeros(num_envs, np.int64),
            policy_version=0,
            adaptation_step=np.zeros(num_envs, np.int64),
            obs=obs,
            mask=np.ones((num_steps, num_envs), np.bool_),
            all_count=True,
            final_step=where[:, 0],
            final_env=where[:, 1],
            final_obs=final_obs.reshape(-1, *obs_shape),
            previous_action=none,
            previous_reward=np.zeros(num_envs, np.float32),
            previous_done=np.ones(num_envs, np.bool_),
            initial_memory=(),
            **arrays,
            **{name: np.empty((num_steps, 0), np.float32) for name in (*unknown, "expert_action")},
        )

    def _gather(
        self, sequences: Sequence[Sequence[Segment]], num_steps: int
    ) -> tuple[Arrays, dict[tuple[int, int], np.ndarray]]:
        """Returns arrays of the steps, and successors by (t, b), including those of all ends."""
        shape = (num_steps, len(sequences))
        obs_shape, action_shape = self._shapes
        arrays: Arrays = {
            "obs": np.empty((num_steps + 1, len(sequences), math.prod(obs_shape)), self._obs_dtype),
            "action": np.empty((*shape, *action_shape), self._action_dtype),
            "reward": np.empty(shape, np.float32),
            "terminated": np.empty(shape, np.bool_),
            "truncated": np.empty(shape, np.bool_),
        }
        reset = np.zeros(shape, np.bool_)
        copies, ends = [], []
        for b, segments in enumerate(sequences):
            t = 0
            for start, stop, resets in segments:
                reset[t, b] = resets
                copies += [(*piece, t + at, b) for *piece, at in self._pieces(start, stop)]
                t += stop - start
                ends.append((t - 1, b, stop - 1))
        final: dict[tuple[int, int], np.ndarray] = {}
        for number, row, size, t, b in sorted(copies):
            block = self._block(number)
            for name, array in arrays.items():
                array[t : t + size, b] = getattr(block, name)[row : row + size]
            known = block.next_row[row : row + size]
            final |= {(t + int(i), b): block.next_obs[known[i]] for i in np.flatnonzero(known >= 0)}
        for t, b, at in ends:
            if (t, b) not in final:
                final[t, b] = self._next(at)
            if t == num_steps - 1:
                arrays["obs"][num_steps, b] = final[t, b]
        return {**arrays, "reset": reset}, dict(sorted(final.items()))

    def _end(self, unit: Unit, step: int) -> int:
        """Returns the end of the unit that contains a step."""
        starts = self.starts[unit]
        return int(starts[np.searchsorted(starts, step, "right")])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Returns (block, row, size, offset from `start`) of the pieces that hold the steps."""
        found, at = [], start
        i = int(np.searchsorted(self._piece_first, start, "right")) - 1
        while at < stop:
            first, end = (int(x) for x in self._piece_first[i : i + 2])
            size = min(stop, end) - at
            row = int(self._piece_row[i]) + at - first
            found.append((int(self._piece_block[i]), row, size, at - start))
            at, i = at + size, i + 1
        return found

    def _steps_at(self, block: int, row: np.ndarray) -> np.ndarray:
        """Returns (n,) the steps at rows of a block; -1 for rows of other stages."""
        mine = np.flatnonzero(self._piece_block == block)
        mine = mine[self._piece_row[mine].argsort()]
        i = mine[np.maximum(np.searchsorted(self._piece_row[mine], row, "right") - 1, 0)]
        step = self._piece_first[i] + row - self._piece_row[i]
        return np.where((row >= self._piece_row[i]) & (step < self._piece_first[i + 1]), step, -1)

    def _next(self, step: int) -> np.ndarray:
        """Returns the observation after a step; the step's own at the end of an episode."""
        last = step + 1 == self._end("episode", step)
        ((number, row, _, _),) = self._pieces(step + (not last), step + 1 + (not last))
        return np.asarray(self._block(number).obs[row])

    def _block(self, number: int) -> Block:
        if number not in self._blocks:
            block = self._source.read(number)
            block.check(*self._spaces)
            self._blocks[number] = block
            size = sum(b.size_bytes for b in self._blocks.values())
            while size > self._memory_bytes and len(self._blocks) > 1:
                size -= self._blocks.popitem(last=False)[1].size_bytes
        self._blocks.move_to_end(number)
        return self._blocks[number]


def _ranks(names: Sequence[Any]) -> np.ndarray:
    """Returns the rank of each name in sorted order."""
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return rank


def _changes(x: np.ndarray) -> np.ndarray:
    """Returns (n,) bool: True at the first value, and where a value differs from the one before."""
    return np.append(True, x[1:] != x[:-1])
