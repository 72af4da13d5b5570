"""Sources of data for offline learning: earlier stages, other runs, and external files."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.data.files import CONTENT, KEYS, Block, ParquetSource, Recorded, Source
from dmrl_ray.errors import ConfigError

RLLIB_COLUMNS = {
    "obs": "obs",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminateds",
    "truncated": "truncateds",
    "next_obs": "new_obs",
    "episode": "eps_id",
}
"""Names of columns in RLlib's offline data, by the names used here."""


class DataSettings(Settings):
    """The source of data: recordings of a stage, external Parquet files, or a Minari dataset."""

    read_with: ClassVar = {"columns": ("files", ())}

    stage: str | None = None
    """The recorded stage, of this run or of `runs`."""

    runs: tuple[str, ...] = ()
    """Run folders, or glob patterns; every worker must be able to read them."""

    files: tuple[str, ...] = ()
    """Parquet files, or glob patterns; every worker must be able to read them."""

    columns: dict[str, str] = Field(default={})
    """Names of columns in `files` that differ, such as ``{obs: observations}``; the names here are
    obs, action, reward, terminated, truncated, next_obs, episode, trial, history and task_id. Only
    the first two are required."""

    rllib: tuple[str, ...] = ()
    """Folders, Parquet files or glob patterns, in the layout of RLlib's offline data: exported from
    here, or recorded by RLlib with ``output_write_episodes=False, output_compress_columns=[]``."""

    minari: str | None = None
    """Name of a Minari dataset on this machine."""

    memory_mb: Number = 256
    """Size of each worker's cache of blocks that were read; affects only the speed."""

    @field_validator("runs", "files", "rllib", mode="before")
    @classmethod
    def _absolute(cls, paths: object) -> object:
        """Makes paths absolute, as workers may have another working directory."""
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
                "{NAME: COLUMN}"
            )
        return self


def recordings_of(algorithm: Settings) -> dict[str, DataSettings]:
    """Returns the data settings of an algorithm, by the name of the setting."""
    found = {name: getattr(algorithm, name) for name in type(algorithm).model_fields}
    return {name: data for name, data in found.items() if isinstance(data, DataSettings)}


class External(ParquetSource):
    """External Parquet files: a row is a step, and rows of an episode are consecutive.

    Defaults for missing columns: an episode ends where it is terminated or truncated, each episode
    is a trial, each file a history, and all are one task. Without ``next_obs``, the successor of an
    episode's last step is its own observation.

    Args:
        patterns: files, or glob patterns.
        names: names of columns in the files, by the names used here, where they differ.

    Raises:
        ValueError: no file matches, or a column is missing.
    """

    def __init__(self, patterns: Sequence[str], names: Mapping[str, str]) -> None:
        found = [sorted(glob.glob(pattern, recursive=True)) for pattern in patterns]
        paths = [Path(path) for files in found for path in files]
        if not paths:
            raise ConfigError(f"data: there is no file {', '.join(patterns)}")
        present = self.open(paths[0]).schema_arrow.names
        same = {name: name for name in (*CONTENT, *KEYS) if name in present}
        super().__init__(paths, {"obs": "obs", "action": "action"} | same | dict(names))
        self._last: tuple[int, dict[str, Any]] = (-1, {})  # file, and state after the last row read

    def pieces(self, block: int) -> np.ndarray:
        names = [n for n in (*KEYS, "terminated", "truncated") if n in self.names]
        table = self.table(block, names)
        column = {name: table[name].to_numpy() for name in names}
        size = self.file(self.place[block][0]).metadata.row_group(self.place[block][1]).num_rows
        file, last = self._last
        if file != self.place[block][0]:
            file, last = self.place[block][0], {"number": 0, "t": -1, "done": False}
        done = np.zeros(size, np.bool_)
        for name in ("terminated", "truncated"):  # If unknown, the episode continues.
            done |= np.nan_to_num(column.get(name, done).astype(np.float32)) != 0
        begins = np.concatenate([[last["done"]], done[:-1]])
        for name in [n for n in KEYS if n in column]:
            before = last.get(name, column[name][0])
            begins |= np.concatenate([[before], column[name][:-1]]) != column[name]
            last[name] = column[name][-1]
        begins[0] |= last["t"] < 0
        at = np.arange(size)
        since = np.maximum.accumulate(np.where(begins, at, -1))
        t = np.where(since < 0, last["t"] + 1 + at, at - since)
        episode = last["number"] + begins.cumsum()
        self._last = (file, {**last, "number": episode[-1], "t": t[-1], "done": done[-1]})
        row = np.flatnonzero(np.concatenate([[True], begins[1:]]))
        numbers, unnamed = np.full(size, file), np.full(size, "")
        histories = column.get("history", numbers)[row]
        history = [self.history_number((str(name),)) for name in histories]
        task = [self.task_number(str(name)) for name in column.get("task_id", unnamed)[row]]
        trial = column.get("trial", episode)[row].astype(np.int64)
        length = np.diff(np.append(row, size))
        return np.stack([history, trial, episode[row], t[row], task, row, length], 1)


class Minari(Source):
    """Episodes of a Minari dataset: each is a block and a trial, all are one history.

    Args:
        dataset: the result of ``minari.load_dataset``, or an object with its interface.
        name: the name of the dataset in messages.
    """

    def __init__(self, dataset: Any, name: str = "") -> None:
        super().__init__()
        self._episodes, self._name = dataset, name
        self.num_blocks = int(dataset.total_episodes)

    @classmethod
    def load(cls, name: str) -> Minari:
        """Loads a dataset on this machine; ValueError if it or the package is missing."""
        try:
            import minari
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"data.minari: {name!r} needs the package minari; pip install 'dmrl-ray[data]'"
            ) from error
        try:
            return cls(minari.load_dataset(name), name)
        except FileNotFoundError as error:
            raise ConfigError(f"data.minari: {name!r} is not on this machine: {error}") from error

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
            raise ConfigError("data.minari: composite observations are not supported")
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
    """Returns the source that settings name; `run_folder` is that of the reading run.

    Raises:
        ValueError: the source does not exist.
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
