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
import os
import re
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
from dmrl_ray.store.tables import SCHEMAS, Cells, TableBuffer, check_columns, schema_of
from dmrl_ray.types import Arrays

SPILL_BYTES = 64 << 20
"""Transitions are written, hidden, before their commit when they fill this much memory."""

_FILE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")


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

    def forget(self, stages: Collection[str]) -> None:
        """Leave out all rows of these stages so far, from the next commit on.

        Parts that hold them stay in the folder under a hidden name, so that a commit before can
        still be gone back to; what they hold of other stages is written again.
        """
        for table, schema in SCHEMAS.items():
            for path in committed_parts(self.folder, table) if "stage" in schema.names else ():
                file = pq.ParquetFile(path)
                check_columns(path, file.schema_arrow, table)
                stage = file.read(["stage"], use_threads=False)["stage"]
                gone = pc.is_in(stage, pa.array(stages, pa.string()))
                if not pc.any(gone).as_py():
                    continue
                self._forgotten.append(f"{table}/{path.name.removeprefix('_')}")
                if not pc.all(gone).as_py():
                    rows = file.read(use_threads=False).filter(pc.invert(gone))
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
