"""Commits: the records that say what a run consists of, and which of them to believe.

A run folder::

    config.yaml   run.json   lock
    commits/00000012.json       commit 12: state, checkpoint files in use, the parts of the tables
    checkpoints/NAME-00000012.safetensors
    episodes/part-00000012-0000-4f0c8a21d3b5e697.parquet      and the other tables
    */_*                        not part of the run: being written, set aside, or replaced since

A commit record carries its own checksum and that of the record before it, and names every file of
the run as it was then. So the records before the newest few are not needed, and are deleted.

``config.yaml`` is what the run was started with, and never written again. What has been changed
since is in the state of every later commit, as ``{"stages.train.env_steps": 2000000}``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeAlias, TypeVar

from dmrl_ray.config.loading import load_config
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.errors import ConfigError, CorruptRun
from dmrl_ray.store.files import FileRecord, LocalFiles, difference

FORMAT_VERSION = 4
Json: TypeAlias = dict[str, object]
_NAME = re.compile(r"(\d{8})\.json")
_TRIES = 5

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit record."""

    number: int  # 1, 2, 3, ...
    epoch: int  # how often the run was opened for writing
    writer: str  # host:pid:random of the process that wrote it
    config_sha256: str
    previous_sha256: str | None  # of the file of commit number - 1
    keep: int  # the files of this many commits, this one included, are on disk
    state: Json
    files: dict[str, FileRecord]  # checkpoint files in use, by name
    parts: list[FileRecord]  # of all tables, sorted by path, which is the order of their rows
    sha256: str = ""  # of this commit's own file; not stored in it

    def to_bytes(self) -> bytes:
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        del record["sha256"]
        record["files"] = {name: asdict(file) for name, file in self.files.items()}
        record["parts"] = [asdict(part) for part in self.parts]
        return seal({"format_version": FORMAT_VERSION, **record})

    @classmethod
    def read(cls, path: Path) -> Commit:
        """Read a record.

        Raises:
            CorruptRun: it is damaged.
            ConfigError: a newer version of dmrl_ray wrote it.
        """
        record, sha256 = read_sealed(path)
        del record["format_version"]
        files = {name: FileRecord(**file) for name, file in record.pop("files").items()}  # type: ignore[attr-defined]
        parts = [FileRecord(**part) for part in record.pop("parts")]  # type: ignore[attr-defined]
        return cls(**record, files=files, parts=parts, sha256=sha256)  # type: ignore[arg-type]


def seal(record: Mapping[str, object], indent: int | None = None) -> bytes:
    """A record as JSON that carries its own checksum."""
    sha256 = hashlib.sha256(json.dumps(record, indent=indent).encode()).hexdigest()
    return json.dumps({**record, "sha256": sha256}, indent=indent).encode()


def read_sealed(path: Path, indent: int | None = None) -> tuple[Json, str]:
    """The record in a file written with `seal`, and the checksum of the whole file."""
    try:
        data = path.read_bytes()
        record = json.loads(data)
        if not isinstance(record, dict) or record.pop("sha256", None) is None:
            raise ValueError("it has no checksum")
        # Compared byte for byte: JSON has several spellings of the same value.
        if seal(record, indent) != data:
            raise ValueError("its checksum does not agree")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptRun(f"{path}: is damaged: {error}") from error
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: has format version {version}, and this dmrl_ray reads {FORMAT_VERSION}; "
            "install the version that wrote it: its tables and commits are others"
        )
    return record, hashlib.sha256(data).hexdigest()


@dataclass
class History:
    """The commits that a run folder still has, and what is wrong with each."""

    folder: Path
    commits: dict[int, Commit]  # records that can be read, by number
    problems: dict[int, list[str]]  # of all records and their parts, by number

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read and check all records and all table parts they name."""
        names = [_NAME.fullmatch(name) for name in LocalFiles(folder).list("commits")]
        paths = {int(m[1]): folder / "commits" / m[0] for m in names if m}
        history = cls(folder, {}, {})
        checked: dict[FileRecord, str | None] = {}
        for number in sorted(paths):
            problems = history.problems[number] = []
            try:
                commit = Commit.read(paths[number])
            except CorruptRun as error:
                problems.append(str(error))
                continue
            before = history.commits.get(number - 1)
            if commit.number != number or (before and before.sha256 != commit.previous_sha256):
                problems.append(f"{paths[number]}: does not follow commit {number - 1}")
            history.commits[number] = commit
            for part in commit.parts:
                if part not in checked:
                    checked[part] = part_problem(folder, part)
                if problem := checked[part]:
                    problems.append(problem)
        return history

    @property
    def last(self) -> int:
        """The number of the newest commit, 0 if there is none yet."""
        return max(self.problems, default=0)

    def newest_complete(self) -> int:
        """The commit to continue from; 0 if there is none yet.

        That is the newest without a problem, apart from those that all commits before it share:
        going back would not repair them.

        Raises:
            CorruptRun: no commit is complete.
        """
        if not self.problems:
            return 0
        for number in reversed(self.commits):
            before = [set(self.problems[n]) for n in self.commits if n < number]
            lost = set(self.problems[number])
            if all(lost <= others for others in before) and not self.file_problems(number):
                return number
        why = "; ".join([*self.problems[self.last], *self.file_problems(self.last)])
        raise CorruptRun(f"{self.folder}: none of its {self.last} commits is complete: {why}")

    def file_problems(self, number: int) -> list[str]:
        """Faults of the checkpoint files of a commit."""
        files = self.commits[number].files.values() if number in self.commits else ()
        return [problem for file in files if (problem := difference(self.folder, file))]


def commit_path(folder: Path, number: int) -> Path:
    """Where commit `number` is recorded."""
    return folder / commit_name(number)


def commit_name(number: int) -> str:
    """The same within the run folder."""
    return f"commits/{number:08d}.json"


def part_problem(folder: Path, part: FileRecord) -> str | None:
    """The fault of a table part, visible already or still hidden."""
    problem = difference(folder, part)
    return problem if problem and difference(folder, hidden(part)) else None


def hidden(part: FileRecord) -> FileRecord:
    """A part before its commit, or after one has left it out."""
    return FileRecord(hidden_path(part.path), part.size_bytes, part.sha256)


HIDDEN = ".hidden"
"""Ends the names of files in a table's folder that a pattern such as *.parquet must not find."""


def hidden_path(part: str) -> str:
    """The path of a part under a name that readers skip."""
    table, name = part.split("/")
    return f"{table}/_{name}{HIDDEN}"


def visible_name(name: str) -> str:
    """The name of a part whose name may be a hidden one."""
    return name.removeprefix("_").removesuffix(HIDDEN)


def committed_parts(run: Path, table: str) -> list[Path]:
    """The files of a table as the newest commit has it, though it be not followed by renames yet.

    So the tables of a run agree with each other at any moment, also after a kill.
    """
    commit = newest_readable(run)
    found = []
    for part in commit.parts if commit is not None else ():
        if part.path.startswith(f"{table}/"):
            path = run / part.path
            other = run / hidden_path(part.path)
            found.append(other if other.exists() and not path.exists() else path)
    return found


def newest_readable(run: Path) -> Commit | None:
    """The newest commit of a run whose record is not damaged; None if there is none."""
    for path in sorted((run / "commits").glob("[0-9]*.json"), reverse=True):
        with suppress(CorruptRun):
            return Commit.read(path)
    return None


def newest_commit(run: Path) -> Commit | None:
    """The newest commit of a run that may be in progress; None if there is none yet.

    Raises:
        CorruptRun: it is damaged.
    """
    records = sorted((run / "commits").glob("[0-9]*.json"))
    return Commit.read(records[-1]) if records else None


def read_committed(runs: Iterable[Path], table: str, read: Callable[[list[Path]], Read]) -> Read:
    """Have `read` read the committed parts of a table, run by run.

    Raises:
        ValueError: a part is missing for good, and not only renamed since it was listed.
    """
    runs = list(runs)
    for _ in range(_TRIES):
        try:
            return read([part for run in runs for part in committed_parts(run, table)])
        except FileNotFoundError as error:
            missing = error.filename
    raise ValueError(f"{missing}: is missing, though a commit names it")


def settings_changed(run: Path) -> list[str]:
    """Settings that were changed since a run began, as the command line writes them."""
    newest = None
    with suppress(CorruptRun):
        newest = newest_commit(run)
    changed = newest.state.get("changed") if newest is not None else None
    return as_overrides(changed) if isinstance(changed, dict) else []


def as_overrides(changed: Mapping[str, object]) -> list[str]:
    """Settings by their dotted names, as the command line writes them."""
    return [f"{name}={json.dumps(value)}" for name, value in changed.items()]


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run continues with: the one it began with, and what was changed since.

    Raises:
        ConfigError: it, or an override, cannot be used.
    """
    return load_config(run / "config.yaml", [*settings_changed(run), *overrides])


def run_facts(folder: Path) -> Json:
    """The content of run.json, checked together with config.yaml.

    Raises:
        ConfigError: `folder` is not a run, is of a newer version, or its config was changed.
    """
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder}: is not a run folder (it has no run.json)")
    facts, _ = read_sealed(folder / "run.json", indent=1)
    try:
        config = (folder / "config.yaml").read_bytes()
    except OSError as error:
        raise ConfigError(f"{folder}/config.yaml: cannot be read: {error.strerror}") from error
    if hashlib.sha256(config).hexdigest() != facts["config_sha256"]:
        raise ConfigError(
            f"{folder}/config.yaml: is not the config that this run was started with; "
            "restore it, or start a new run with the changed one"
        )
    return facts


def verify(folder: Path) -> list[str]:
    """Every problem found in a run's records, table parts and checkpoint files.

    Raises:
        ConfigError: `folder` is not a run, or of a newer version.
    """
    return list(_all_problems(Path(folder)))


def _all_problems(folder: Path) -> Iterator[str]:
    try:
        run_facts(folder)
    except (CorruptRun, ConfigError) as error:
        if not (folder / "run.json").is_file():
            raise
        yield str(error)
    history = History.read(folder)
    yield from dict.fromkeys(p for found in history.problems.values() for p in found)
    seen: set[FileRecord] = set()
    for commit in reversed(history.commits.values()):
        files = set(commit.files.values())
        yield from (p for f in files - seen if (p := difference(folder, f)))
        seen |= files
    named = {part.path for commit in history.commits.values() for part in commit.parts}
    for path in sorted(folder.glob("*/part-*.parquet")):
        if path.relative_to(folder).as_posix() not in named:
            yield f"{path}: belongs to no commit"
