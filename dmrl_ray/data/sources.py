"""Where data for offline learning come from: earlier stages, other runs, and files of others."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.data.files import CONTENT, KEYS, Block, ParquetSource, Recorded, Source

RLLIB_COLUMNS = {
    "obs": "obs",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminateds",
    "truncated": "truncateds",
    "next_obs": "new_obs",
    "episode": "eps_id",
}
"""Our names of columns, and those of RLlib's offline data."""


class DataSettings(Settings):
    """Where data are: what a stage recorded, Parquet files of others, or a Minari dataset."""

    read_with: ClassVar = {"columns": ("files", ())}

    stage: str | None = None
    """Stage that was recorded; of this run, unless `runs` says of which."""

    runs: tuple[str, ...] = ()
    """Run folders, or patterns of them; every worker must be able to read them."""

    files: tuple[str, ...] = ()
    """Parquet files, or patterns of them, likewise."""

    columns: dict[str, str] = Field(default={})
    """What the columns of `files` are called, such as ``{obs: observations}``: of obs, action,
    reward, terminated, truncated, next_obs, episode, trial, history and task_id. The first two
    must be there."""

    rllib: tuple[str, ...] = ()
    """Folders or Parquet files, or patterns, in the layout of RLlib's offline data: exported from
    here, or recorded there with ``output_write_episodes=False, output_compress_columns=[]``."""

    minari: str | None = None
    """Name of a Minari dataset that is on this machine."""

    memory_mb: Number = 256
    """What has been read is kept in each worker up to this size; changes the speed alone."""

    @field_validator("runs", "files", "rllib", mode="before")
    @classmethod
    def _absolute(cls, paths: object) -> object:
        """Workers may have another working directory."""
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list | tuple):
            return paths
        return tuple(os.path.abspath(os.path.expanduser(str(path))) for path in paths)

    @model_validator(mode="after")
    def _has_one_source(self) -> DataSettings:
        sources = (self.stage or self.runs, self.files, self.rllib, self.minari)
        if sum(map(bool, sources)) != 1:
            raise ValueError("name one source of data: stage (and runs), files, rllib or minari")
        if unknown := self.columns.keys() - {*CONTENT, *KEYS}:
            raise ValueError(
                f"columns: {min(unknown)!r} is none of {', '.join(CONTENT + KEYS)}; write "
                "{ours: theirs}"
            )
        return self


def recordings_of(algorithm: Settings) -> dict[str, DataSettings]:
    """What an algorithm learns from, by the setting that names it."""
    found = {name: getattr(algorithm, name) for name in type(algorithm).model_fields}
    return {name: data for name, data in found.items() if isinstance(data, DataSettings)}


class External(ParquetSource):
    """Parquet files of others: a row is a step, and rows of an episode follow each other.

    Without a column for it, an episode ends where it is terminated or truncated, and is a trial of
    its own; a file is a history, and all is one task. The successor of an episode's last step is
    taken to be its own observation where there is no ``next_obs``.

    Args:
        patterns: files, or patterns.
        names: our names of columns and theirs, where they differ.

    Raises:
        ValueError: there is no such file, or it lacks a column.
    """

    def __init__(self, patterns: Sequence[str], names: Mapping[str, str]) -> None:
        found = [sorted(glob.glob(pattern, recursive=True)) for pattern in patterns]
        paths = [Path(path) for files in found for path in files]
        if not paths:
            raise ValueError(f"data: there is no file {', '.join(patterns)}")
        there = pq.ParquetFile(paths[0]).schema_arrow.names
        same = {name: name for name in (*CONTENT, *KEYS) if name in there}
        super().__init__(paths, {"obs": "obs", "action": "action"} | same | dict(names))
        self._before: tuple[int, dict[str, Any]] = (-1, {})  # file, and the last row's books

    def pieces(self, block: int) -> np.ndarray:
        names = [n for n in (*KEYS, "terminated", "truncated") if n in self.names]
        table = self.table(block, names)
        column = {name: table[name].to_numpy() for name in names}
        size = self.file(self.place[block][0]).metadata.row_group(self.place[block][1]).num_rows
        file, books = self._before
        if file != self.place[block][0]:
            file, books = self.place[block][0], {"number": 0, "t": -1, "over": False}
        over = np.zeros(size, np.bool_)
        for name in ("terminated", "truncated"):  # Where it is not known, the episode goes on.
            over |= np.nan_to_num(column.get(name, over).astype(np.float32)) != 0
        begins = np.concatenate([[books["over"]], over[:-1]])
        for name in [n for n in KEYS if n in column]:
            last = books.get(name, column[name][0])
            begins |= np.concatenate([[last], column[name][:-1]]) != column[name]
            books[name] = column[name][-1]
        begins[0] |= books["t"] < 0
        at = np.arange(size)
        since = np.maximum.accumulate(np.where(begins, at, -1))
        t = np.where(since < 0, books["t"] + 1 + at, at - since)
        episode = books["number"] + begins.cumsum()
        self._before = (file, {**books, "number": episode[-1], "t": t[-1], "over": over[-1]})
        row = np.flatnonzero(np.concatenate([[True], begins[1:]]))
        own, one = np.full(size, file), np.full(size, "")
        history = [self.history_number((str(name),)) for name in column.get("history", own)[row]]
        task = [self.task_number(str(name)) for name in column.get("task_id", one)[row]]
        trial = column.get("trial", episode)[row].astype(np.int64)
        length = np.diff(np.append(row, size))
        return np.stack([history, trial, episode[row], t[row], task, row, length], 1)


class Minari(Source):
    """Episodes of a Minari dataset, each a block, a trial and all of one history.

    Args:
        dataset: what ``minari.load_dataset`` gives, or any object like it.
        name: how messages name it.
    """

    def __init__(self, dataset: Any, name: str = "") -> None:
        super().__init__()
        self._episodes, self._name = dataset, name
        self.num_blocks = int(dataset.total_episodes)

    @classmethod
    def load(cls, name: str) -> Minari:
        """A dataset on this machine; ValueError if it, or the package, is not there."""
        try:
            import minari
        except ModuleNotFoundError as error:
            raise ValueError(
                f"data.minari: {name!r} needs the package minari; pip install 'dmrl-ray[data]'"
            ) from error
        try:
            return cls(minari.load_dataset(name), name)
        except FileNotFoundError as error:
            raise ValueError(f"data.minari: {name!r} is not on this machine: {error}") from error

    def pieces(self, block: int) -> np.ndarray:
        length = len(self._episodes[block].rewards)
        task, history = self.task_number(""), self.history_number(("",))
        return np.array([[history, block, 0, 0, task, 0, length]])

    def where(self, block: int, row: int) -> str:
        return f"data.minari: {self._name} episode {block} step {row}"

    def read(self, block: int) -> Block:
        episode = self._episodes[block]
        obs = np.asarray(episode.observations)
        if obs.dtype == object or obs.ndim == 0:
            raise ValueError("data.minari: observations of several parts cannot be read")
        length = len(episode.rewards)
        next_row = np.full(length, -1)
        next_row[-1] = 0
        flat = obs.reshape(length + 1, -1)  # The last is the successor of the last step.
        return Block(
            obs=flat[:-1],
            action=np.asarray(episode.actions),
            reward=np.asarray(episode.rewards),
            terminated=np.asarray(episode.terminations),
            truncated=np.asarray(episode.truncations),
            next_obs=flat[-1:],
            next_row=next_row,
        )


def source_of(settings: DataSettings, run_folder: str) -> Source:
    """What `settings` name; `run_folder` is of the run that reads.

    Raises:
        ValueError: it is not there.
    """
    if settings.minari:
        return Minari.load(settings.minari)
    if settings.rllib:
        inside = [
            os.path.join(p, "**", "*.parquet") if os.path.isdir(p) else p for p in settings.rllib
        ]
        return External(inside, RLLIB_COLUMNS)
    if settings.files:
        return External(settings.files, settings.columns)
    return Recorded(settings.runs or (glob.escape(run_folder),), settings.stage)
