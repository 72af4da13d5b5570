"""Making, locking and opening run folders.

Opening chooses a commit and brings the folder to it. Every step may be repeated: stopped half way,
the next opening comes to the same result.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dmrl_ray.errors import ConfigError, FolderInUse, StorageError
from dmrl_ray.store.commit_records import (
    FORMAT_VERSION,
    HIDDEN,
    SET_ASIDE,
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
    FileRecord,
    atomic_file,
    make_folder,
    names_inside,
    refuse_links,
    storage_errors,
    sync_folder,
    synced_file,
)
from dmrl_ray.store.tables import SCHEMAS

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
_FOLDERS = ("commits", "checkpoints", *SCHEMAS)
_OWN_NAMES = {"run.json", "config.yaml", "lock", *_FOLDERS}
_PART = re.compile(r"part-\d{8}-\d{4}-[0-9a-f]{16}\.parquet")
_CHECKPOINT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*-(\d{8})(?:-\d+)?\.(?:safetensors|npz)")
_TEMPORARY = re.compile(r"_.+\.\d+\.tmp")


def refuse_url(folder: Path) -> None:
    """Raise ConfigError if a folder is a URL, such as that of an object store."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(folder)):
        raise ConfigError(
            f"{folder}: is a URL, and folders are on local or shared file systems; give a path"
        )


def local_path(folder: Path) -> Path:
    """The absolute path of a run folder; ConfigError if it cannot be one."""
    refuse_url(folder)
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
        refuse_links(folder, _OWN_NAMES)
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
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class FolderLock:
    """Holds ``folder/lock`` until `release`, or until the process ends in whatever way."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        path = folder / "lock"
        refuse_links(folder, ["lock"])
        with storage_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                raise FolderInUse(
                    f"{folder}: is being written by {holder}; wait for it, or stop it first"
                ) from None
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                    raise StorageError(
                        f"{folder}: its file system has no locks ({error.strerror}), which keep a "
                        "second process from writing the run; give a folder on a local disk and "
                        "copy it when the run is done, or mount the file system with locks"
                    ) from error
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
    refuse_links(folder, _OWN_NAMES)
    for name in _FOLDERS:
        make_folder(folder / name)
    history = History.read(folder)
    number = history.newest_complete()
    messages = _messages(history, number)
    numbers = [n for n in sorted(history.commits, reverse=True) if n <= number]
    keep = history.commits[number].keep if number else 0
    kept = [history.commits[n] for n in numbers[:keep]]
    lost = {part for commit in kept[:1] for part in commit.parts if part_problem(folder, part)}
    kept = [replace(c, parts=[part for part in c.parts if part not in lost]) for c in kept]
    with storage_errors(folder):
        _tidy_checkpoints(folder, history, kept)
        for n in sorted([*history.replaced, *numbers[keep:]]):
            os.unlink(commit_path(folder, n))
        _set_commits_aside(folder, history.problems.keys() - set(numbers))
        for table in SCHEMAS:
            _tidy_table(folder / table, kept, lost)
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
    _delete_temporary(folder / "commits")
    sync_folder(folder / "commits")


def _set_aside(path: Path) -> None:
    """Give a file a name that says that it was found damaged; an empty one, if it is missing."""
    target = path.with_name(f"{SET_ASIDE}{path.name}{HIDDEN}")
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{SET_ASIDE}{attempt}-{path.name}{HIDDEN}")
    if path.exists():
        os.rename(path, target)
    elif attempt == 1:
        with synced_file(target):
            pass


def _tidy_table(folder: Path, kept: list[Commit], lost: Collection[FileRecord]) -> None:
    """The newest commit's parts are visible, those of commits before it hidden, others gone."""
    named = {part.path for commit in kept[:1] for part in commit.parts}
    older = {part.path for commit in kept[1:] for part in commit.parts} - named
    _delete_temporary(folder)
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
    for file in lost:
        if file.path.startswith(f"{folder.name}/"):
            _set_aside(folder.parent / file.path)  # Readers know by it that the loss was told.
    sync_folder(folder)


def _delete_temporary(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            os.unlink(path)


def _tidy_checkpoints(folder: Path, history: History, kept: list[Commit]) -> None:
    """Delete what commits named and do not keep, and what was saved for commits that are not."""
    checkpoints = folder / "checkpoints"
    _delete_temporary(checkpoints)
    in_use = _checkpoints_of(kept)
    named = _checkpoints_of([*history.replaced.values(), *history.commits.values()])
    newest = kept[0].number if kept else 0
    for path in checkpoints.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        is_own = path.name in named or (match is not None and int(match[1]) >= newest)
        if is_own and path.name not in in_use:
            os.unlink(path)
    sync_folder(checkpoints)  # before the records by which these files were known


def _checkpoints_of(commits: Iterable[Commit]) -> set[str]:
    paths = {file.path for commit in commits for file in commit.files.values()}
    return {path.removeprefix("checkpoints/") for path in paths}


def files_of_others(folder: Path) -> list[Path]:
    """Files and links in a run folder that are not of the run; they are left alone."""
    history = History.read(folder)
    named = _checkpoints_of([*history.replaced.values(), *history.commits.values()])
    found = [path for path in folder.iterdir() if path.name not in _OWN_NAMES]
    found += [folder / name for name in _OWN_NAMES if (folder / name).is_symlink()]
    for name in names_inside(folder, "checkpoints"):
        match = _CHECKPOINT.fullmatch(name)
        # Those above the newest commit may be in use by the next one.
        if name not in named and not (match and int(match[1]) > history.last):
            found.append(folder / "checkpoints" / name)
    for table in SCHEMAS:
        names = names_inside(folder, table)
        found += [folder / table / name for name in names if not _PART.fullmatch(name)]
    return sorted(path for path in found if not path.name.startswith("_"))
