"""The one writer of a run folder: buffers rows, and makes them durable commit by commit.

A commit, in this order, so that a stop at any moment leaves the commit whole or absent::

    rows -> _part-N-I-HASH.parquet (hidden, fsync)    checkpoint files (saved before, fsync)
                          \\                         /
              commits/N.json (fsync, link: put-if-absent, fsync)        <- the commit point
                                     |
    _part-N-I-HASH.parquet -> part-N-I-HASH.parquet (visible to readers); the reverse, if removed
    checkpoint files that no kept commit names are deleted
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmrl_ray.errors import FolderInUse
from dmrl_ray.store.commits import (
    Commit,
    Json,
    commit_name,
    committed_parts,
    hidden,
    hidden_path,
    run_facts,
)
from dmrl_ray.store.files import (
    FileRecord,
    Files,
    LocalFiles,
    is_numeric,
    load_arrays,
    save_arrays,
)
from dmrl_ray.store.run_folder import FolderLock, local_path, make_run, recover
from dmrl_ray.store.tables import (
    SCHEMAS,
    Cells,
    TableBuffer,
    read_part,
    schema_of,
)
from dmrl_ray.types import Arrays, Columns

logger = logging.getLogger(__name__)

SPILL_BYTES = 64 << 20
"""Transitions are written, hidden, before their commit when they fill this much memory."""

_FILE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")


class Job(Protocol):
    """The job that rows are of."""

    @property
    def stage(self) -> str:
        """The stage's name."""

    @property
    def name(self) -> str:
        """The job's."""

    @property
    def algorithm_name(self) -> str:
        """As it stands in the tables."""

    @property
    def seed(self) -> int:
        """The run's."""


class RunWriter:
    """Writes one run folder, under its lock. Made by `create` or `open`.

    Attributes:
        run_id: of the run, wherever its folder is.
        state: of the newest commit; None before the first.
        files: checkpoint files in use by the newest commit.
        recovery: what was found damaged when the run was opened, and what was done about it.
    """

    def __init__(self, folder: Path, lock: FolderLock, record: Json, keep: int) -> None:
        self.folder = folder
        self._files: Files = LocalFiles(folder)
        self.run_id = str(record["run_id"])
        self.keep = keep
        self.number = 0
        self.state: Json | None = None
        self.files: dict[str, FileRecord] = {}
        self.recovery: list[str] = []
        self._lock = lock
        # Unlike any other's, so that two writers' parts never have one name.
        self._name = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(8).hex()}"
        self._epoch = 1
        self._config_sha256 = str(record["config_sha256"])
        self._previous_sha256: str | None = None
        self._buffers = {table: TableBuffer(table) for table in SCHEMAS}
        self._tasks: tuple[set[int], dict[str, set[int]]] | None = None  # see `_known`
        self._spilled: list[FileRecord] = []  # parts for the next commit, written already
        self._forgotten: list[str] = []  # parts that are not in the next commit
        self._removed: list[str] = []  # parts that are not in the newest commit
        self._renames: list[tuple[str, str]] = []  # of parts, committed but not yet done
        self._kept: list[set[str]] = []  # paths that the newest commits name, newest first
        self._saved: dict[str, int] = {}  # checkpoint files on disk: number of the commit to come

    @classmethod
    def create(
        cls,
        folder: Path,
        config_yaml: str,
        facts: Mapping[str, object],
        *,
        overwrite: bool = False,
        keep: int = 3,
    ) -> RunWriter:
        """Make a run folder.

        Raises:
            ConfigError: it exists already (and `overwrite` is False), or cannot be a run folder.
            FolderInUse: another process writes it.
        """
        folder = local_path(folder)
        lock, record = make_run(folder, config_yaml, facts, overwrite=overwrite)
        return cls(folder, lock, record, keep)

    @classmethod
    def open(cls, folder: Path, *, keep: int = 3) -> RunWriter:
        """Open a run folder to continue from its newest complete commit.

        Raises:
            ConfigError: it is not a run folder, of a newer version, or its config was changed.
            FolderInUse: another process writes it.
            CorruptRun: none of its commits is complete.
        """
        folder = local_path(folder)
        run_facts(folder)
        lock = FolderLock(folder)
        try:
            record = run_facts(folder)
            kept, messages = recover(folder)
        except BaseException:
            lock.release()
            raise
        writer = cls(folder, lock, record, keep)
        writer.recovery = messages
        if kept:
            writer._continue_from(kept)
        return writer

    def _continue_from(self, kept: list[Commit]) -> None:
        newest = kept[0]
        self.number, self._previous_sha256 = newest.number, newest.sha256
        self.state, self.files = newest.state, newest.files
        self._epoch = newest.epoch + 1
        self._removed = newest.removed
        self._kept = [{file.path for file in commit.files.values()} for commit in kept]
        self._saved = dict.fromkeys(set().union(*self._kept), 0)

    def add(self, table: str, columns: Mapping[str, Cells]) -> None:
        """Buffer rows, column by column; single values stand in all rows.

        ``run_id`` and ``time`` (seconds since 1970) are filled in; ``success`` and ``score`` may
        be missing.

        Raises:
            ValueError: a column is missing, unknown, of another length or of another type.
        """
        schema_of(table)
        filled = {"run_id": self.run_id, **columns}
        buffer = self._buffers[table]
        if "time" in buffer.schema.names:
            filled.setdefault("time", time.time())
        buffer.add(filled)
        if buffer.size_bytes >= SPILL_BYTES:
            self._spilled.append(self._write_part(table, self.number + 1, buffer))
            buffer.clear()

    def add_tasks(self, rows: Mapping[str, pa.Array], trained: str | None = None) -> None:
        """Rows of the tasks table, where they are not in it yet.

        Args:
            rows: of tasks that are named in the run from here on.
            trained: the stage that was trained on them, if one was.
        """
        known, trained_on = self._known()
        names = _names(rows["task_id"].to_pylist(), rows["split"].to_pylist())
        self._add_fresh("tasks", rows, names, known)
        if trained is not None:
            rows = {key: rows[key] for key in ("task_id", "split")}
            seen = trained_on.setdefault(trained, set())
            self._add_fresh("trained_on", rows, names, seen, stage=trained)

    def add_trained_on(self, stage: str, tasks: Collection[tuple[str, str]]) -> None:
        """Ids and splits of tasks that a stage was trained on elsewhere."""
        ids, splits = zip(*sorted(tasks), strict=True) if tasks else ((), ())
        rows = {"task_id": pa.array(ids, pa.string()), "split": pa.array(splits, pa.string())}
        seen = self._known()[1].setdefault(stage, set())
        self._add_fresh("trained_on", rows, _names(ids, splits), seen, stage=stage)

    def _add_fresh(
        self,
        table: str,
        rows: Mapping[str, pa.Array],
        names: list[int],
        known: set[int],
        **cells: str,
    ) -> None:
        """Add the rows whose names are not known, which they are from here on."""
        if not known.isdisjoint(names):
            fresh = np.flatnonzero([name not in known for name in names])
            rows, names = {k: x.take(fresh) for k, x in rows.items()}, [names[i] for i in fresh]
        if names:
            known.update(names)
            self.add(table, {**rows, **cells})

    def _known(self) -> tuple[set[int], dict[str, set[int]]]:
        """Names of the tasks in the tasks table, and in trained_on by stage."""
        if self._tasks is None:
            self._tasks = set(), {}
            for part in committed_parts(self.folder, "tasks"):
                rows = read_part(part, "tasks", ("task_id", "split")).to_pydict()
                self._tasks[0].update(_names(rows["task_id"], rows["split"]))
            for part in committed_parts(self.folder, "trained_on"):
                rows = read_part(part, "trained_on", ("stage", "task_id", "split")).to_pydict()
                names = _names(rows["task_id"], rows["split"])
                for stage, name in zip(rows["stage"], names, strict=True):
                    self._tasks[1].setdefault(stage, set()).add(name)
        return self._tasks

    def add_episodes(self, job: Job, rows: Columns) -> None:
        """Rows of the episodes table."""
        if len(rows["return"]) == 0:
            return
        cells: dict[str, Cells] = {
            "change": None,
            **rows,
            "success": pa.array(rows["success"] > 0, mask=np.isnan(rows["success"])),
            "score": None if np.isnan(rows["score"]).all() else rows["score"],
            "algorithm": job.algorithm_name,
            "seed": job.seed,
        }
        self.add("episodes", {**cells, "stage": job.stage, "job": job.name})

    def add_steps(self, job: Job, steps: Mapping[str, Cells]) -> None:
        """Rows of the transitions table."""
        self.add("transitions", {**steps, "stage": job.stage, "job": job.name})

    def add_metrics(
        self, job: Job, policy_version: int, env_steps: int, metrics: Mapping[str, float]
    ) -> None:
        """Rows of the metrics table."""
        cells: dict[str, Cells] = {
            "policy_version": policy_version,
            "env_steps": env_steps,
            "name": list(metrics),
            "value": np.array(list(metrics.values()), np.float64),
        }
        self.add("metrics", {**cells, "stage": job.stage, "job": job.name})

    def add_event(self, event: str, stage: str, job: str, detail: Mapping[str, object]) -> None:
        """Add a row to the events table, and a line to the log."""
        logger.info("%s %s %s %s", event, stage, job, detail)
        cells = {"stage": stage, "job": job, "event": event, "detail": json.dumps(detail)}
        self.add("events", cells)

    def forget(self, stages: Collection[str]) -> None:
        """Leave out all rows of these stages so far, from the next commit on.

        Parts that hold them stay in the folder under a hidden name, so that a commit before can
        still be gone back to; what they hold of other stages is written again.
        """
        for stage in stages:
            self._known()[1].pop(stage, None)
        for table, schema in SCHEMAS.items():
            for path in committed_parts(self.folder, table) if "stage" in schema.names else ():
                rows = read_part(path, table)
                gone = pc.is_in(rows["stage"], pa.array(stages, pa.string()))
                if not pc.any(gone).as_py():
                    continue
                self._forgotten.append(f"{table}/{path.name.removeprefix('_')}")
                if not pc.all(gone).as_py():
                    rows = rows.filter(pc.invert(gone))
                    buffer = TableBuffer(table)
                    buffer.add({name: rows[name].combine_chunks() for name in rows.column_names})
                    self._spilled.append(self._write_part(table, self.number + 1, buffer))

    def save(
        self, name: str, arrays: Arrays, metadata: Mapping[str, str] | None = None
    ) -> FileRecord:
        """Write arrays as a new checkpoint file, which the next commit may name.

        A file that neither of the next two commits names is deleted.
        """
        name = name.replace("/", ".")
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a checkpoint file")
        suffix = ".safetensors" if is_numeric(arrays) else ".npz"
        path = base = f"checkpoints/{name}-{self.number + 1:08d}"
        attempt = 1
        while path + suffix in self._saved:
            attempt += 1
            path = f"{base}-{attempt}"
        record = save_arrays(self._files, path + suffix, arrays, metadata)
        self._saved[record.path] = self.number + 1
        return record

    def load(self, name: str) -> Arrays:
        """The arrays of a checkpoint file that the newest commit names."""
        if name not in self.files:
            known = ", ".join(self.files) or "none"
            raise ValueError(f"{self.folder}: no checkpoint {name!r} in use; there are: {known}")
        return load_arrays(self._files, self.files[name])

    def commit(self, state: Json, files: Mapping[str, FileRecord]) -> int:
        """Make the buffered rows, the state and the saved files durable, all or nothing.

        Must not be interrupted by an exception of a signal handler and then called again.

        Args:
            state: plain JSON values, given back by `open`.
            files: every checkpoint file in use from here on, by name.

        Raises:
            StorageError: nothing is committed and the rows are still buffered, or (if `number`
                went up) all is committed and only the renames are left to the next commit.
            FolderInUse: another process has committed this number; stop.
        """
        number = self.number + 1
        for file in files.values():
            assert (self.folder / file.path).is_file(), f"{file.path} is not on disk"
        state = json.loads(json.dumps(state))
        parts = self._write_parts(number)
        record = self._record(number, state, files, self._spilled + parts)
        data = record.to_bytes()
        won = False
        try:
            won = self._files.put_if_absent(commit_name(number), data)
        finally:
            if not won:
                self._delete([hidden(part).path for part in parts])
        if not won:
            raise FolderInUse(f"{self.folder}: another process has written commit {number}")
        self.number, self.state, self.files = number, state, dict(files)
        self._previous_sha256 = hashlib.sha256(data).hexdigest()
        for buffer in self._buffers.values():
            buffer.clear()
        self._renames += [(hidden(part).path, part.path) for part in record.parts]
        self._renames += [(part, hidden_path(part)) for part in self._forgotten]
        self._removed, self._spilled, self._forgotten = record.removed, [], []
        self._publish()
        self._prune()
        return number

    def _record(
        self, number: int, state: Json, files: Mapping[str, FileRecord], parts: list[FileRecord]
    ) -> Commit:
        return Commit(
            number=number,
            epoch=self._epoch,
            writer=self._name,
            config_sha256=self._config_sha256,
            previous_sha256=self._previous_sha256,
            keep=self.keep,
            state=state,
            files=dict(files),
            parts=parts,
            removed=self._removed + self._forgotten,
        )

    def _write_parts(self, number: int) -> list[FileRecord]:
        parts: list[FileRecord] = []
        try:
            for table, buffer in self._buffers.items():
                if buffer.num_rows:
                    parts.append(self._write_part(table, number, buffer))
        except BaseException:
            self._delete([hidden(part).path for part in parts])
            raise
        return parts

    def _write_part(self, table: str, number: int, buffer: TableBuffer) -> FileRecord:
        data = memoryview(buffer.to_parquet({"dmrl.writer": self._name}))
        order = len(self._spilled)  # Readers sort by name, and rows shall come as they were added.
        digest = hashlib.sha256(data).hexdigest()
        name = f"part-{number:08d}-{order:04d}-{digest[:16]}.parquet"
        part = FileRecord(f"{table}/{name}", data.nbytes, digest)
        self._files.put(hidden(part).path, data)
        return part

    def _publish(self) -> None:
        while self._renames:
            self._files.rename(*self._renames[0])
            self._renames.pop(0)

    def _prune(self) -> None:
        self._kept = [{file.path for file in self.files.values()}, *self._kept][: self.keep]
        named = set().union(*self._kept)
        old = [path for path, n in self._saved.items() if path not in named and n < self.number]
        self._delete(old)
        for path in old:
            del self._saved[path]

    def _delete(self, paths: list[str]) -> None:
        for path in paths:  # What is left over is deleted when the run is opened next.
            self._files.delete(path)

    def discard(self) -> None:
        """Drop the rows that were not committed, and keep those that were to be forgotten."""
        self._delete([hidden(part).path for part in self._spilled])
        self._spilled, self._forgotten = [], []
        self._tasks = None
        for buffer in self._buffers.values():
            buffer.clear()

    def close(self) -> None:
        """Release the lock; rows that were not committed are dropped."""
        self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _names(task_ids: Sequence[str], splits: Sequence[str]) -> list[int]:
    """Tasks in their splits, as hashes: a long run draws millions of them."""
    return list(map(hash, zip(task_ids, splits, strict=True)))
