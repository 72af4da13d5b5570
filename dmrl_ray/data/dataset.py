"""Recorded transitions as batches of sequences, for algorithms that learn from data.

A dataset is one long row of steps in a fixed order: history after history (an environment column
of a job), in each the order in which it was lived. What is drawn from it is a function of a random
stream alone: not of how rows were spread over files, nor of what was read before. Blocks are read
when a step in them is wanted, and the last ones are kept, up to a number of bytes.

Rollout workers read, each for its shards, and several learners take their share of what was read:
nothing has to be split beforehand, as by Ray Data's ``streaming_split``, and nothing remembered.

Before the first draw all numbers are read once. A row with one that is not finite is left out, and
so is the step before it where that leads to the row's observation; and of what is read whole, such
as an episode or a trial, all of it. Nothing is joined over the gap.
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
"""First step, the one after the last, and whether memory is forgotten before the first."""

Spans: TypeAlias = tuple[np.ndarray, np.ndarray]
"""First steps, and those after the last."""

PLACES_NAMED = 3
"""Rows with numbers that are not finite that are named; others are counted."""


@dataclass(frozen=True)
class LeftOut:
    """Rows of the data that are not learned from, as some of their numbers are not finite."""

    rows: int
    of: int
    first: tuple[str, ...]  # places and columns of the first of them

    def __str__(self) -> str:
        more = self.rows - len(self.first)
        rest = f" and {more} more" if more else ""
        return (
            f"{self.rows} of {self.of} rows hold numbers that are not finite: "
            f"{'; '.join(self.first)}{rest}"
        )


class Dataset:
    """Steps in a fixed order, and where their episodes, trials and histories begin.

    Args:
        source: the blocks.
        obs_space: of the task family; what is read must fit it.
        action_space: likewise.
        memory_bytes: of blocks kept.

    Raises:
        ValueError: there are no steps, or they do not fit the family.
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
            raise ValueError("data: no steps were recorded there; record a stage with record: true")
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
        # What goes on in the next collection is one episode still.
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
    def _unfit(self) -> tuple[np.ndarray, LeftOut | None]:
        """Steps that are left out, in their order, and what to say of them."""
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
            for r in row[: PLACES_NAMED - len(named)].tolist():
                names = ", ".join(name for name, wrong in columns.items() if wrong[r])
                named.append(f"{self._source.where(block, r)}: {names}")
            found.append(step)
            if "obs" in columns:  # What leads there leads to nothing that is known.
                blind = step[columns["obs"][row]]
                found.append(np.setdiff1d(blind, self.starts["episode"]) - 1)
        if not rows:
            return np.empty(0, np.int64), None
        return np.unique(np.concatenate(found)), LeftOut(rows, self.num_steps, tuple(named))

    @property
    def left_out(self) -> LeftOut | None:
        """What is not drawn from, if anything is not."""
        return self._unfit[1]

    @cached_property
    def _stretches(self) -> Spans:
        """Parts of episodes, as long as nothing in them is left out."""
        unfit = self._unfit[0]
        cuts = np.unique(np.concatenate([self.starts["episode"], unfit, unfit + 1]))
        begin, end = cuts[:-1], cuts[1:]
        fit = ~np.isin(begin, unfit)
        if not fit.any():
            raise ConfigError(f"data: nothing is left to learn from, as {self.left_out}")
        return begin[fit], end[fit]

    @cached_property
    def _stretch_ends(self) -> np.ndarray:
        """Steps in the stretches up to and with each."""
        begin, end = self._stretches
        ends: np.ndarray = (end - begin).cumsum()
        return ends

    @cached_property
    def _task_of(self) -> np.ndarray:
        """Whose each stretch is, as a place in `task_names`."""
        episode = np.searchsorted(self.starts["episode"], self._stretches[0], "right") - 1
        task: np.ndarray = self._task_of_episode[episode]
        return task

    def _whole(self, unit: Unit) -> Spans:
        """Units of which nothing is left out."""
        if unit not in self._whole_units:
            starts = self.starts[unit]
            fit = np.diff(np.searchsorted(self._unfit[0], starts)) == 0
            if not fit.any():
                raise ConfigError(
                    f"data: no {unit} is whole, and only whole ones can be learned from, as "
                    f"{self.left_out}"
                )
            self._whole_units[unit] = starts[:-1][fit], starts[1:][fit]
        return self._whole_units[unit]

    @cached_property
    def _lives(self) -> np.ndarray:
        """Where the whole episodes of a history begin among all whole ones, if it has any."""
        begin, _ = self._whole("episode")
        return np.unique(np.searchsorted(begin, self.starts["history"]))

    def windows(self, rng: np.random.Generator, columns: int, steps: int) -> Rollout:
        """Steps that follow each other, from anywhere: each step is as likely as any other.

        Where a row is left out, what follows it is another sequence.
        """
        (begin, end), ends = self._stretches, self._stretch_ends
        drawn = []
        for start in rng.integers(ends[-1], size=columns).tolist():
            segments: list[Segment] = []
            i, left = int(np.searchsorted(ends, start, "right")), steps
            at = int(end[i]) - (int(ends[i]) - start)
            while left:
                stop = min(int(end[i]), at + left)
                segments.append((at, stop, True))
                left -= stop - at
                i = (i + 1) % len(begin)
                at = int(begin[i])
            drawn.append(segments)
        return self.rollout(drawn, steps)

    def units(self, rng: np.random.Generator, unit: Unit, columns: int, steps: int) -> Rollout:
        """Whole units, one behind the other and each from its beginning; the last ones are cut.

        One with a row that is left out is left out as a whole.
        """
        begin, end = self._whole(unit)
        drawn = []
        for _ in range(columns):
            segments: list[Segment] = []
            left = steps
            while left:
                i = int(rng.integers(len(begin)))
                stop = min(int(end[i]), int(begin[i]) + left)
                segments.append((int(begin[i]), stop, True))
                left -= stop - int(begin[i])
            drawn.append(segments)
        return self.rollout(drawn, steps)

    def histories(
        self, rng: np.random.Generator, columns: int, steps: int, *, every: int
    ) -> Rollout:
        """Episodes of a history in the order in which they were lived, as one sequence.

        What is too short for all steps is followed by another sequence. An episode with a row that
        is left out is left out as a whole, as those are that `every` passes over.

        Args:
            every: of a history only every n-th episode counts, beginning with one of the first n.
        """
        drawn = []
        for _ in range(columns):
            segments: list[Segment] = []
            left = steps
            while left:
                fresh = True
                for start, end in self._excerpt(rng, left, every):
                    stop = min(end, start + left)
                    segments.append((start, stop, fresh))
                    left, fresh = left - (stop - start), False
                    if left == 0:
                        break
            drawn.append(segments)
        return self.rollout(drawn, steps)

    def _excerpt(self, rng: np.random.Generator, steps: int, every: int) -> list[tuple[int, int]]:
        """Episodes of one history, from one after which enough steps follow if there is one."""
        begin, end = self._whole("episode")
        i = int(rng.integers(len(self._lives) - 1))
        first, last = self._lives[i : i + 2].tolist()
        kept = slice(first + int(rng.integers(min(every, last - first))), last, every)
        begin, end = begin[kept], end[kept]
        enough = (end - begin)[::-1].cumsum()[::-1] >= steps
        start = int(rng.integers(max(1, int(enough.sum()))))
        return list(zip(begin[start:].tolist(), end[start:].tolist(), strict=True))

    def of_tasks(
        self, rng: np.random.Generator, tasks: Sequence[str], steps: int, *, newest: float = 1.0
    ) -> Rollout:
        """For each task a column of stretches of its episodes, from anywhere in them.

        Args:
            tasks: names.
            newest: share of each history, its end, that is drawn from.
        """
        drawn = []
        for task in tasks:
            begin, end = self._stretches_of(task, newest)
            ends = (end - begin).cumsum()
            segments: list[Segment] = []
            left = steps
            while left:
                at = int(rng.integers(ends[-1]))
                i = int(np.searchsorted(ends, at, "right"))
                start = int(end[i]) - (int(ends[i]) - at)
                stop = min(int(end[i]), start + left)
                segments.append((start, stop, True))
                left -= stop - start
            drawn.append(segments)
        return self.rollout(drawn, steps)

    def tasks_of(self, newest: float) -> list[str]:
        """Tasks that `of_tasks` can draw from."""
        return [name for name in self.task_names if len(self._stretches_of(name, newest)[0])]

    def _stretches_of(self, task: str, newest: float) -> Spans:
        """Where the task's stretches begin and end, within the newest part of their histories."""
        (begin, end), histories = self._stretches, self.starts["history"]
        mine = np.flatnonzero(self._task_of == self.task_names.index(task))
        begin, end = begin[mine], end[mine]
        of = np.searchsorted(histories, begin, "right")
        size = histories[of] - histories[of - 1]
        begin = np.maximum(begin, histories[of] - np.ceil(size * newest).astype(np.int64))
        kept = begin < end
        return begin[kept], end[kept]

    def rollout(self, drawn: Sequence[Sequence[Segment]], steps: int) -> Rollout:
        """Segments, end to end in their columns, `steps` in each; their successors are the true."""
        columns = len(drawn)
        obs_shape, action_shape = self._shapes
        arrays, final = self._gather(drawn, steps)
        none = np.full((columns, *action_shape), -1 if self._discrete else 0, self._action_dtype)
        where = np.array(list(final), np.int64)
        final_obs = np.stack(list(final.values())).astype(self._obs_dtype)
        obs = arrays.pop("obs").reshape(steps + 1, columns, *obs_shape)
        never_said = ("log_prob", "value", "next_value", "advantage", "value_target")
        return Rollout(
            task_index=np.zeros(columns, np.int64),
            policy_version=0,
            adaptation_step=np.zeros(columns, np.int64),
            obs=obs,
            mask=np.ones((steps, columns), np.bool_),
            all_count=True,
            final_step=where[:, 0],
            final_env=where[:, 1],
            final_obs=final_obs.reshape(-1, *obs_shape),
            previous_action=none,
            previous_reward=np.zeros(columns, np.float32),
            previous_done=np.ones(columns, np.bool_),
            initial_memory=(),
            **arrays,
            **{name: np.empty((steps, 0), np.float32) for name in (*never_said, "expert_action")},
        )

    def _gather(
        self, drawn: Sequence[Sequence[Segment]], steps: int
    ) -> tuple[Arrays, dict[tuple[int, int], np.ndarray]]:
        """Arrays of the steps, and the successors known at (t, b), among them all last steps'."""
        shape = (steps, len(drawn))
        obs_shape, action_shape = self._shapes
        arrays: Arrays = {
            "obs": np.empty((steps + 1, len(drawn), math.prod(obs_shape)), self._obs_dtype),
            "action": np.empty((*shape, *action_shape), self._action_dtype),
            "reward": np.empty(shape, np.float32),
            "terminated": np.empty(shape, np.bool_),
            "truncated": np.empty(shape, np.bool_),
        }
        reset = np.zeros(shape, np.bool_)
        copies, ends = [], []
        for b, segments in enumerate(drawn):
            t = 0
            for start, stop, fresh in segments:
                reset[t, b] = fresh
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
            if t == steps - 1:
                arrays["obs"][steps, b] = final[t, b]
        return {**arrays, "reset": reset}, dict(sorted(final.items()))

    def _end(self, unit: Unit, step: int) -> int:
        """Where the unit that a step belongs to ends."""
        starts = self.starts[unit]
        return int(starts[np.searchsorted(starts, step, "right")])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Block, row, size and distance from `start` of what steps consist of."""
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
        """(n,) numbers of the steps in some rows of a block; -1 for rows of other stages."""
        mine = np.flatnonzero(self._piece_block == block)
        mine = mine[self._piece_row[mine].argsort()]
        i = mine[np.maximum(np.searchsorted(self._piece_row[mine], row, "right") - 1, 0)]
        step = self._piece_first[i] + row - self._piece_row[i]
        return np.where((row >= self._piece_row[i]) & (step < self._piece_first[i + 1]), step, -1)

    def _next(self, step: int) -> np.ndarray:
        """The observation after a step whose successor is not told; its own if it is the last."""
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
    """The place of each name in their order."""
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return rank


def _changes(x: np.ndarray) -> np.ndarray:
    """(n,) bool: where a value differs from the one before; True at the first."""
    return np.append(True, x[1:] != x[:-1])
