"""Making, locking and opening run folders.

Opening chooses a commit and brings the folder to it. Every step may be repeated: stopped half way,
the next opening comes to the same result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dmrl_ray.errors import ConfigError, FolderInUse
from dmrl_ray.store.commits import (
    FORMAT_VERSION,
    HIDDEN,
    Commit,
    History,
    Json,
    commit_path,
    hidden_path,
    part_problem,
    seal,
    visible_name,
)
from dmrl_ray.store.files import (
    atomic_file,
    make_folder,
    storage_errors,
    sync_folder,
)
from dmrl_ray.store.tables import SCHEMAS

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
_FOLDERS = ("commits", "checkpoints", *SCHEMAS)
_OWN_NAMES = {"run.json", "config.yaml", "lock", *_FOLDERS}
_PART = re.compile(r"part-\d{8}-\d{4}-[0-9a-f]{16}\.parquet")
_SET_ASIDE = "_rejected-"


def local_path(folder: Path) -> Path:
    """The absolute path of a run folder; ConfigError if it cannot be one."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(folder)):
        raise ConfigError(f"{folder}: run folders are on local or shared file systems; give a path")
    path = Path(os.path.abspath(folder))
    if not _NAME.fullmatch(path.name):
        raise ConfigError(
            f"{folder}: {path.name!r} cannot name a run; use up to 64 letters, digits, dots, "
            "dashes and underscores, beginning with a letter or digit"
        )
    return path


def make_run(
    folder: Path, config_yaml: str, facts: Mapping[str, object], *, overwrite: bool
) -> tuple[FolderLock, Json]:
    """Make a run folder and lock it; what was in it is deleted if `overwrite`.

    Returns:
        The lock, and the content of run.json.
    """
    _refuse_occupied(folder, overwrite)
    make_folder(folder)
    lock = FolderLock(folder)
    try:
        _refuse_occupied(folder, overwrite)
        with storage_errors(folder):
            _clear(folder)
        for name in _FOLDERS:
            make_folder(folder / name)
        config = config_yaml.encode()
        with atomic_file(folder / "config.yaml") as file:
            file.write(config)
        record: Json = {
            "format_version": FORMAT_VERSION,
            "run_id": f"{folder.name}-{os.urandom(6).hex()}",  # kept when the folder moves
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "facts": dict(facts),
        }
        with atomic_file(folder / "run.json") as file:  # last: it makes the folder a run
            file.write(seal(record, indent=1))
    except BaseException:
        lock.release()
        raise
    return lock, record


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    external = {name for name in names - _OWN_NAMES if not name.startswith("_")}
    full = any(any((folder / name).iterdir()) for name in names & set(_FOLDERS))
    if external or (full and not names & {"run.json", "lock"}):
        raise ConfigError(f"{folder}: exists and is not a run folder; choose another name")
    if ("run.json" in names or full) and not overwrite:
        raise ConfigError(
            f"{folder}: this run exists; continue it with `resume`, or delete it and start again "
            "with `--overwrite`"
        )


def _clear(folder: Path) -> None:
    (folder / "run.json").unlink(missing_ok=True)  # first: half a run is never taken for one
    sync_folder(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


class FolderLock:
    """Holds ``folder/lock`` until `release`, or until the process ends in whatever way."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        path = folder / "lock"
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                raise FolderInUse(
                    f"{folder}: is being written by {holder}; wait for it, or stop it first"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            start = datetime.now(UTC).isoformat(timespec="seconds")
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        # A forked child shares the lock; it would keep it after its parent was killed.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(this()))

    def release(self) -> None:
        """Let others write."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        _close(self)


def _close(lock: FolderLock | None) -> None:
    if lock is not None and lock._descriptor >= 0:
        os.close(lock._descriptor)
        lock._descriptor = -1


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['host']}, started {facts['start']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
    finally:
        os.close(descriptor)


def recover(folder: Path) -> tuple[list[Commit], list[str]]:
    """Bring a locked run folder to its newest complete commit.

    Returns:
        The commits that are kept, newest first and without the parts that are lost for good (none
        if the run has no commit yet), and a message for everything that was found damaged.
    """
    for name in _FOLDERS:
        make_folder(folder / name)
    history = History.read(folder)
    number = history.newest_complete()
    messages = _messages(history, number)
    kept = [history.commits[n] for n in sorted(history.commits, reverse=True) if n <= number]
    lost = {part for commit in kept[:1] for part in commit.parts if part_problem(folder, part)}
    kept = [replace(c, parts=[part for part in c.parts if part not in lost]) for c in kept]
    with storage_errors(folder):
        for commit in kept[kept[0].keep :] if kept else ():
            os.unlink(commit_path(folder, commit.number))
        _set_commits_aside(folder, history.problems.keys() - {commit.number for commit in kept})
        kept = kept[: kept[0].keep] if kept else kept
        for table in SCHEMAS:
            _tidy_table(folder / table, kept)
        _tidy_checkpoints(folder, kept)
    return kept, messages


def _messages(history: History, number: int) -> list[str]:
    messages = []
    for n in sorted(history.problems, reverse=True):
        if n > number or n not in history.commits:
            why = "; ".join([*history.problems[n], *history.file_problems(n)])
            messages.append(f"commit {n} is set aside: {why}")
    if history.last > number:
        messages.append(f"continuing from commit {number}")
    return messages + [f"lost for good: {p}" for p in history.problems.get(number, ())]


def _set_commits_aside(folder: Path, numbers: Collection[int]) -> None:
    for number in sorted(numbers, reverse=True):  # so that what is left is a history
        _set_aside(commit_path(folder, number))
    for path in (folder / "commits").glob("_*.tmp"):
        os.unlink(path)
    sync_folder(folder / "commits")


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{_SET_ASIDE}{path.name}{HIDDEN}")
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{_SET_ASIDE}{attempt}-{path.name}{HIDDEN}")
    os.rename(path, target)


def _tidy_table(folder: Path, kept: list[Commit]) -> None:
    """The newest commit's parts are visible, those of commits before it hidden, others gone."""
    named = {part.path for commit in kept[:1] for part in commit.parts}
    older = {part.path for commit in kept[1:] for part in commit.parts} - named
    for path in folder.glob("_*.tmp"):
        os.unlink(path)
    for path in sorted(folder.iterdir()):
        name = visible_name(path.name)
        part = f"{folder.name}/{name}"
        if not _PART.fullmatch(name):
            continue
        is_hidden = path.name != name
        if part in named:
            if is_hidden:
                os.rename(path, folder / name)
        elif part in older:
            if not is_hidden:
                os.rename(path, folder.parent / hidden_path(part))
        elif is_hidden:
            os.unlink(path)
        else:
            _set_aside(path)
    sync_folder(folder)


def _tidy_checkpoints(folder: Path, kept: list[Commit]) -> None:
    named = {file.path for commit in kept for file in commit.files.values()}
    for path in (folder / "checkpoints").iterdir():
        if path.is_file() and f"checkpoints/{path.name}" not in named:
            os.unlink(path)
