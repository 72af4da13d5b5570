"""Blocks of recorded transitions: the row groups of Parquet files, with an index of their contents.

Blocks are read whole.
"""

from __future__ import annotations

import glob
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.errors import ConfigError
from dmrl_ray.store.commit_records import committed_parts, visible_name
from dmrl_ray.store.parquet import open_parquet
from dmrl_ray.store.tables import HISTORY, IN_HISTORY, open_part

CONTENT = ("obs", "action", "reward", "terminated", "truncated", "next_obs")
KEYS = ("episode", "trial", "history", "task_id")
_TELLING = (*IN_HISTORY, "environment", "policy_version", "reward")


@dataclass(frozen=True)
class Block:
    """Steps in memory: arrays (n, ...) with flat observations; missing values are NaN or None."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_obs: np.ndarray  # (m, D) successors that differ from the observation of the next row
    next_row: np.ndarray  # (n,) each step's row in `next_obs`, or -1

    @property
    def size_bytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(int(array.nbytes) for array in vars(self).values())

    def check(self, obs_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        """Raises ValueError if the steps do not match the spaces of the task family."""
        width, shape = self.obs.shape[1], tuple(obs_space.shape or ())
        if width != math.prod(shape):
            raise ConfigError(
                f"data: observations have {width} numbers, but those of the task family have shape "
                f"{shape}; use the task family of the recording"
            )
        action = self.action
        fits = action.shape[1:] == tuple(action_space.shape or ())
        if fits and isinstance(action_space, gym.spaces.Discrete):
            action = action[~_not_finite(action)]  # A column with gaps is read as floats.
            within = (action >= 0) & (action < action_space.n)
            fits = bool(within.all() and (action == action.astype(np.int64)).all())
        if not fits:
            raise ConfigError("data: some actions are not in the action space of the task family")

    def not_finite(self) -> dict[str, np.ndarray]:
        """Returns, for each column with non-finite numbers as float32, (n,) bool: rows with one."""
        found = {name: _not_finite(getattr(self, name)) for name in CONTENT}
        if found["next_obs"].any():
            found["next_obs"] = (self.next_row >= 0) & found["next_obs"][self.next_row]
        return {name: rows for name, rows in found.items() if rows.any()}


class Source(ABC):
    """Blocks of steps, numbered from 0; histories are sorted by their names."""

    num_blocks: int

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._task_numbers: dict[str, int] = {}

    @property
    def histories(self) -> list[tuple[Any, ...]]:
        """Names of the histories, by number."""
        return list(self._numbers)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, by number."""
        return list(self._task_numbers)

    @abstractmethod
    def pieces(self, block: int) -> np.ndarray:
        """Returns (P, 7) history, trial, episode, t, task, row and length of contiguous parts of
        episodes."""

    @abstractmethod
    def read(self, block: int) -> Block:
        """Returns the steps of a block."""

    @abstractmethod
    def where(self, block: int, row: int) -> str:
        """Returns the location of a row, for messages."""

    def not_finite(self, block: int) -> dict[str, np.ndarray]:
        """Returns `Block.not_finite` of a block; reads no more than needed."""
        return self.read(block).not_finite()

    def history_number(self, history: tuple[Any, ...]) -> int:
        """Returns the number of a history, a new one for a new history."""
        return self._numbers.setdefault(history, len(self._numbers))

    def task_number(self, task: str) -> int:
        """Returns the number of a task, a new one for a new task."""
        return self._task_numbers.setdefault(task, len(self._task_numbers))


class ParquetSource(Source):
    """Row groups of Parquet files as blocks.

    Args:
        paths: the files.
        names: names of columns in the files, by the names used here.

    Raises:
        ValueError: a file cannot be read, or lacks a column.
    """

    def __init__(self, paths: Sequence[Path], names: Mapping[str, str]) -> None:
        super().__init__()
        self.paths, self.names = list(paths), dict(names)
        self._opened: tuple[int, Any] = (-1, None)
        groups = [self.file(i).num_row_groups for i in range(len(self.paths))]
        self.place = [(i, group) for i, count in enumerate(groups) for group in range(count)]
        self.num_blocks = len(self.place)

    def read(self, block: int, names: Collection[str] = CONTENT) -> Block:
        names = [name for name in CONTENT if name in names and name in self.names]
        table = self.table(block, names)
        size = table.num_rows
        next_row, next_obs = np.full(size, -1), np.empty((0, 1), np.float32)
        if "next_obs" in names:
            column = table["next_obs"].combine_chunks()
            present = column.is_valid().to_numpy(zero_copy_only=False)
            next_obs = _flat(column.drop_null())
            next_row[present] = np.arange(len(next_obs))
        zero, false = np.zeros(size, np.float32), np.zeros(size, np.bool_)
        column = {name: _flat(table[name].combine_chunks()) for name in names if name != "next_obs"}
        obs = column.get("obs", zero).reshape(size, -1)
        return Block(
            obs=obs,
            action=column.get("action", zero),
            reward=column.get("reward", zero),
            terminated=column.get("terminated", false),
            truncated=column.get("truncated", false),
            next_obs=next_obs.reshape(-1, obs.shape[1]),
            next_row=next_row,
        )

    def where(self, block: int, row: int) -> str:
        file, group = self.place[block]
        metadata = self.file(file).metadata
        before = sum(metadata.row_group(i).num_rows for i in range(group))
        return f"{self.paths[file]} row {before + row}"

    def not_finite(self, block: int) -> dict[str, np.ndarray]:
        schema = self.file(self.place[block][0]).schema_arrow
        floats = {name for name in self.names if not _pixels(schema.field(self.names[name]))}
        return self.read(block, floats).not_finite()

    def table(self, block: int, names: Sequence[str]) -> pa.Table:
        """Returns columns of a row group, with the names used here."""
        file, group = self.place[block]
        columns = [self.names[name] for name in names]
        try:
            table = self.file(file).read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self.paths[file]}: is damaged: {error}") from error
        return pa.table({name: table[self.names[name]] for name in names})

    def file(self, number: int) -> Any:
        """Opens a file and checks its schema."""
        if self._opened[0] != number:
            path = self.paths[number]
            file = self.open(path)
            self._check(path, file.schema_arrow)
            self._opened = (number, file)
        return self._opened[1]

    def open(self, path: Path) -> pq.ParquetFile:
        """Opens a file; columns of extension types, such as Ray's tensors, become plain ones.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return open_parquet(path, open(path, "rb"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error

    def _check(self, path: Path, schema: pa.Schema) -> None:
        for name, column in self.names.items():
            if column not in schema.names:
                raise ConfigError(
                    f"{path}: has no column {column!r} for {name!r}, but {', '.join(schema.names)}"
                )
            field = schema.field(column)
            kind = _element(field.type)
            if not (pa.types.is_primitive(kind) or pa.types.is_string(kind)):
                raise ConfigError(f"{path}: column {column!r} is {field.type}, which is not plain")
            if name in CONTENT and pa.types.is_string(field.type):
                raise ConfigError(
                    f"{path}: column {column!r} is text instead of numbers; RLlib writes them with "
                    "output_compress_columns=[]"
                )


class Recorded(ParquetSource):
    """Transitions tables of run folders.

    A part that is merged with others while it is read from is read from the merged one.

    Args:
        runs: run folders, or glob patterns.
        stage: the recorded stage; None takes all.

    Raises:
        ValueError: nothing was recorded there.
    """

    def __init__(self, runs: Sequence[str], stage: str | None) -> None:
        folders = [Path(path) for run in runs for path in sorted(glob.glob(run))]
        paths = [part for folder in folders for part in committed_parts(folder, "transitions")]
        if not paths:
            raise ConfigError(
                f"data: {', '.join(runs)}: no transitions were recorded; record a stage with "
                "record: true"
            )
        self._stage = stage
        self._contents: dict[int, list[tuple[int, object]]] = {}
        known = ("task_id", "split", *HISTORY, *IN_HISTORY, *CONTENT)
        super().__init__(paths, {name: name for name in known})

    def file(self, number: int) -> Any:
        try:
            file = super().file(number)
        except FileNotFoundError as error:
            if number not in self._contents:
                raise ConfigError(f"{self.paths[number]}: is no longer in the run") from error
            file = self._from_merged(number)
            self._opened = (number, file)
        if number not in self._contents:
            self._contents[number] = _contents(file)
        return file

    def _from_merged(self, number: int) -> Any:
        """Returns the part as it was, made of its rows in the part that it was merged into."""
        path, name = self.paths[number], _place_of(self.paths[number])
        run = path.parents[1]
        now = sorted(committed_parts(run, "transitions"), key=_place_of)
        holder = next((part for part in now if _place_of(part) >= name), None)
        if holder is None:
            raise ConfigError(f"{path}: is no longer in the run")
        before = max((p for p in map(_place_of, now) if p < name), default="")
        mates = [i for i, p in enumerate(self.paths) if p.parents[1] == run]
        mates = [i for i in mates if before < _place_of(self.paths[i]) < name]
        row = sum(rows for i in mates for rows, _ in self._contents[i])
        file = self.open(holder)
        self._check(holder, file.schema_arrow)
        try:
            table, out = file.read(use_threads=False), pa.BufferOutputStream()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{holder}: is damaged: {error}") from error
        with pq.ParquetWriter(out, table.schema, compression="none") as writer:
            for rows, _ in self._contents[number]:
                writer.write_table(table.slice(row, rows), row_group_size=rows)
                row += rows
        part = pq.ParquetFile(pa.BufferReader(out.getvalue()))
        if _contents(part) != self._contents[number]:
            raise ConfigError(f"{path}: is no longer in the run as it was")
        return part

    def pieces(self, block: int) -> np.ndarray:
        table = self.table(block, ("task_id", *HISTORY, *IN_HISTORY))
        codes = {name: _codes(table[name]) for name in ("task_id", "run_id", "stage", "job")}
        columns = {name: code for name, (code, _) in codes.items()}
        columns |= {name: table[name].to_numpy() for name in ("environment", *IN_HISTORY)}
        t = columns.pop("t")
        breaks = np.diff(t) != 1
        for column in columns.values():
            breaks |= np.diff(column) != 0
        row = np.flatnonzero(np.concatenate([[True], breaks]))
        length = np.diff(np.append(row, len(t)))
        at = {name: column[row] for name, column in columns.items()}
        names = [codes[name][1][at[name]] for name in ("run_id", "stage", "job")]
        task = codes["task_id"][1][at["task_id"]]
        chosen = np.ones(len(row), np.bool_) if self._stage is None else names[1] == self._stage
        labels = zip(*(n[chosen] for n in names), at["environment"][chosen].tolist(), strict=True)
        numbers = (
            np.array([self.history_number(label) for label in labels], np.int64),
            np.array([self.task_number(name) for name in task[chosen]], np.int64),
        )
        rest = np.stack([at["trial"], at["episode"], t[row], row, length], 1)[chosen]
        return np.column_stack([numbers[0], rest[:, :3], numbers[1], rest[:, 3:]])

    def where(self, block: int, row: int) -> str:
        names = ("stage", "job", "environment", *IN_HISTORY)
        (cells,) = self.table(block, names).slice(row, 1).to_pylist()
        known = ", ".join(f"{name} {cell}" for name, cell in cells.items())
        return f"{super().where(block, row)} ({known})"

    def sources(self) -> set[tuple[str, str, str, str]]:
        """Returns the (run, stage, task, split) combinations of all recorded rows."""
        names = ["run_id", "stage", "task_id", "split"]
        found: set[tuple[str, str, str, str]] = set()
        for block in range(self.num_blocks):
            rows = self.table(block, names).group_by(names).aggregate([]).select(names)
            found.update(zip(*rows.to_pydict().values(), strict=True))
        return {row for row in found if self._stage in (None, row[1])}

    def open(self, path: Path) -> pq.ParquetFile:
        return open_part(path, "transitions")


def _place_of(part: Path) -> str:
    """Returns the part of a name that says where the rows stand in the table."""
    return visible_name(part.name)[: len("part-00000001-0000")]


def _contents(file: Any) -> list[tuple[int, object]]:
    """Returns the number of rows of each row group, and the ranges of its numbers."""
    found: list[tuple[int, object]] = []
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        known = [c.statistics for c in columns if c.path_in_schema in _TELLING and c.statistics]
        found.append((group.num_rows, [(s.min, s.max) for s in known]))
    return found


def _pixels(field: pa.Field) -> bool:
    """Returns whether a field holds lists of integers, which are finite and large to read."""
    return field.type != _element(field.type) and pa.types.is_integer(_element(field.type))


def _element(kind: pa.DataType) -> pa.DataType:
    """Returns the type of the numbers in lists, or in lists of lists."""
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _flat(column: pa.Array) -> np.ndarray:
    """Returns numbers (n,), or lists as (n, width); NaN for missing lists."""
    size, nested = len(column), False
    if column.null_count and _is_list(column.type) and pa.types.is_floating(_element(column.type)):
        present = _flat(column.drop_null())
        rows = np.full((size, math.prod(present.shape[1:])), np.nan, present.dtype)
        rows[column.is_valid().to_numpy(zero_copy_only=False)] = present.reshape(-1, rows.shape[1])
        return rows
    while _is_list(column.type):
        column, nested = column.flatten(), True
    values = column.to_numpy(zero_copy_only=False)
    if not nested or size == 0:
        return np.asarray(values)
    if len(values) % size:
        raise ConfigError("data: lists of one column differ in length")
    return np.asarray(values).reshape(size, -1)


def _not_finite(x: np.ndarray) -> np.ndarray:
    """Returns (n,) bool: the rows of an array (n, ...) that are non-finite as float32, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        if x.dtype == object:
            x = x.astype(np.float32)  # None becomes NaN.
        # A fast check: a finite sum has only finite terms (an infinite one may be an overflow).
        if x.dtype.kind != "f" or np.isfinite(x.sum(dtype=np.float32)):
            return np.zeros(len(x), np.bool_)
        rows = x.astype(np.float32).reshape(len(x), -1)
    return np.logical_or.reduce(~np.isfinite(rows), axis=1)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the dictionary encoding of a column: codes, and the distinct values."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(), np.array(encoded.dictionary.to_pylist(), object)
