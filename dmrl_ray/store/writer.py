"""The one writer of a run folder: buffers rows, and makes them durable commit by commit.

A commit, in this order, so that a stop at any moment leaves the commit whole or absent::

    rows -> _part-N-I-HASH.parquet.hidden (fsync)     checkpoint files (saved before, fsync)
                          \\                         /
              commits/N.json (fsync, link: put-if-absent, fsync)        <- the commit point
                                     |
    _part-N-I-HASH.parquet.hidden -> part-N-I-HASH.parquet; the reverse, if it is left out
    files that no kept commit names are deleted; then the records before the kept ones

Small parts of a commit before are merged, as further rows, in the first step (`compaction`).
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
from dmrl_ray.store import compaction
from dmrl_ray.store.commit_records import (
    Commit,
    Json,
    commit_name,
    committed_parts,
    hidden,
    hidden_path,
    run_facts,
    visible_name,
)
from dmrl_ray.store.files import (
    FileRecord,
    Files,
    LocalFiles,
    is_numeric,
    load_arrays,
    save_arrays,
    storage_errors,
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
        self._parts: list[FileRecord] = []  # of the newest commit
        self._spilled: list[FileRecord] = []  # parts for the next commit, written already
        self._forgotten: set[str] = set()  # parts that are not in the next commit
        self._unmerged: set[str] = set()  # tables with parts that cannot be merged
        self._renames: list[tuple[str, str]] = []  # of parts, committed but not yet done
        self._kept: dict[int, set[str]] = {}  # paths that the newest commits name, by number
        self._left_out: set[str] = set()  # parts that only commits before the newest name
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
        self._parts = newest.parts
        self._kept = {c.number: {f.path for f in (*c.files.values(), *c.parts)} for c in kept}
        self._saved = {file.path: 0 for commit in kept for file in commit.files.values()}
        self._left_out = {part.path for commit in kept for part in commit.parts}
        self._left_out -= {part.path for part in newest.parts}

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

        Parts that hold them stay in the folder under a hidden name for as long as a commit is kept
        that names them; what they hold of other stages is written again.
        """
        for stage in stages:
            self._known()[1].pop(stage, None)
        for table, schema in SCHEMAS.items():
            for path in committed_parts(self.folder, table) if "stage" in schema.names else ():
                rows = read_part(path, table)
                gone = pc.is_in(rows["stage"], pa.array(stages, pa.string()))
                if not pc.any(gone).as_py():
                    continue
                self._forgotten.add(f"{table}/{visible_name(path.name)}")
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
        left_out = set(self._forgotten)
        written: list[FileRecord] = []
        won = False
        try:
            left_out |= self._merge(written)
            self._write_parts(number, written)
            stay = [part for part in self._parts if part.path not in left_out]
            parts = sorted(stay + self._spilled + written, key=lambda part: part.path)
            data = self._record(number, state, files, parts).to_bytes()
            won = self._files.put_if_absent(commit_name(number), data)
        finally:
            if not won:
                self._delete([hidden(part).path for part in written])
        if not won or self._is_outrun(number, written):
            raise FolderInUse(f"{self.folder}: another process has written commit {number}")
        self.number, self.state, self.files = number, state, dict(files)
        self._previous_sha256 = hashlib.sha256(data).hexdigest()
        for buffer in self._buffers.values():
            buffer.clear()
        self._renames += [(hidden(part).path, part.path) for part in self._spilled + written]
        self._renames += [(part, hidden_path(part)) for part in sorted(left_out)]
        self._parts, self._spilled, self._forgotten = parts, [], set()
        self._left_out |= left_out
        named = {file.path for file in (*files.values(), *parts)}
        self._kept = {number: named, **self._kept}
        self._publish()
        self._prune()
        return number

    def _is_outrun(self, number: int, written: list[FileRecord]) -> bool:
        """Whether a commit just written is undone, as another process is past this number."""
        name, newest = commit_name(number), ""
        try:
            with storage_errors(self.folder / "commits"):
                newest = max(n for n in self._files.list("commits") if n[0].isdigit())
        finally:
            if f"commits/{newest}" != name:
                self._delete([name, *(hidden(part).path for part in written)])
        return f"commits/{newest}" != name

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
        )

    def _merge(self, written: list[FileRecord]) -> set[str]:
        """Write parts of the newest commit again as one; returns the paths of these parts."""
        stay = [part for part in self._parts if part.path not in self._forgotten]
        parts = compaction.most_mergeable(stay, except_of=self._unmerged)
        if not parts:
            return set()
        table, last = parts[-1].path.split("/")
        try:
            data = compaction.merged(self.folder, parts, {"dmrl.writer": self._name})
        except (ValueError, OSError) as error:  # Readers tell it, too; the run goes on.
            self._unmerged.add(table)
            logger.warning("parts are not merged: %s", error)
            return set()
        # Named as the last of them, so that the rows stay where they were.
        written.append(self._put_part(table, last[: len("part-00000001-0000")], memoryview(data)))
        return {part.path for part in parts}

    def _write_parts(self, number: int, written: list[FileRecord]) -> None:
        for table, buffer in self._buffers.items():
            if buffer.num_rows:
                written.append(self._write_part(table, number, buffer))

    def _write_part(self, table: str, number: int, buffer: TableBuffer) -> FileRecord:
        data = memoryview(buffer.to_parquet({"dmrl.writer": self._name}))
        order = len(self._spilled)  # Readers sort by name, and rows shall come as they were added.
        return self._put_part(table, f"part-{number:08d}-{order:04d}", data)

    def _put_part(self, table: str, begin: str, data: memoryview) -> FileRecord:
        digest = hashlib.sha256(data).hexdigest()
        part = FileRecord(f"{table}/{begin}-{digest[:16]}.parquet", data.nbytes, digest)
        self._files.put(hidden(part).path, data)
        return part

    def _publish(self) -> None:
        for path, other in self._renames:
            self._files.rename(path, other)
        for folder in sorted({path.split("/")[0] for path, _ in self._renames}):
            self._files.sync(folder)
        self._renames.clear()

    def _prune(self) -> None:
        kept = {number: self._kept[number] for number in list(self._kept)[: self.keep]}
        named = set().union(*kept.values())
        saved = {p for p, n in self._saved.items() if p not in named and n < self.number}
        parts = self._left_out - named
        self._delete([*saved, *map(hidden_path, parts)])
        if saved:
            self._files.sync("checkpoints")  # Files are known by a record, so it goes last.
        self._delete([commit_name(n) for n in sorted(self._kept.keys() - kept.keys())])
        self._kept = kept
        self._saved = {path: n for path, n in self._saved.items() if path not in saved}
        self._left_out -= parts

    def _delete(self, paths: list[str]) -> None:
        for path in paths:  # What is left over is deleted when the run is opened next.
            self._files.delete(path)

    def discard(self) -> None:
        """Drop the rows that were not committed, and keep those that were to be forgotten."""
        self._delete([hidden(part).path for part in self._spilled])
        self._spilled, self._forgotten = [], set()
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
