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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.config.yaml_text import MAX_BYTES
from dmrl_ray.errors import ConfigError, CorruptRun
from dmrl_ray.store.files import FileRecord, LocalFiles, difference, open_inside
from dmrl_ray.store.tables import SCHEMAS

FORMAT_VERSION = 4
Json: TypeAlias = dict[str, object]
MAX_RECORD_BYTES = 64 << 20
_NAME = re.compile(r"(\d{8})\.json")
_PART_NAME = re.compile(r"part-(?:(\d{8})-)?.*\.parquet")
SET_ASIDE = "_rejected-"
"""Begins the names of files that were found damaged, or missing (then they are empty)."""

HIDDEN = ".hidden"
"""Ends the names of files in a table's folder that a pattern such as *.parquet must not find."""

_SET_ASIDE_NAME = re.compile(rf"{SET_ASIDE}(?:\d+-)?(\d{{8}})\.json{re.escape(HIDDEN)}")
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
    keep: Annotated[
        int, Field(gt=0)
    ]  # the files of this many commits, this one included, are on disk
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
        record, sha256 = read_sealed(path.parents[1], f"commits/{path.name}")
        return _validated(_COMMIT, path, {**record, "sha256": sha256})


@dataclass(frozen=True, slots=True)
class _RunJson:
    """The content of run.json."""

    format_version: int
    run_id: str
    config_sha256: str
    facts: Json


_COMMIT, _RUN_JSON = TypeAdapter(Commit), TypeAdapter(_RunJson)


def _validated(kind: TypeAdapter[Read], path: Path, record: Json) -> Read:
    try:
        return kind.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise CorruptRun(f"{path}: is damaged: {where}: {first['msg']}") from error


def seal(record: Mapping[str, object], indent: int | None = None) -> bytes:
    """A record as JSON that carries its own checksum."""
    sha256 = hashlib.sha256(json.dumps(record, indent=indent).encode()).hexdigest()
    return json.dumps({**record, "sha256": sha256}, indent=indent).encode()


def read_sealed(folder: Path, name: str, indent: int | None = None) -> tuple[Json, str]:
    """The record in a file of a folder written with `seal`, and the checksum of the whole file."""
    path = folder / name
    try:
        with open_inside(folder, name) as file:
            data = file.read(MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"it has more than {MAX_RECORD_BYTES} bytes")
        record = json.loads(data)
        if not isinstance(record, dict) or record.pop("sha256", None) is None:
            raise ValueError("it has no checksum")
        # Compared byte for byte: JSON has several spellings of the same value.
        if seal(record, indent) != data:
            raise ValueError("its checksum does not agree")
    except RecursionError as error:
        raise CorruptRun(f"{path}: is damaged: it is nested too deeply") from error
    except OSError as error:
        raise CorruptRun(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptRun(f"{path}: is damaged: {error}") from error
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: has format version {str(version)[:20]}, and this dmrl_ray reads "
            f"{FORMAT_VERSION}; install the version that wrote it: its tables and commits differ"
        )
    return record, hashlib.sha256(data).hexdigest()


@dataclass
class History:
    """The commits that a run folder still has, and what is wrong with each.

    A commit deletes the records before the newest few. Stopped while it does, it leaves some that
    count no more: files that they name may be gone.
    """

    folder: Path
    commits: dict[int, Commit]  # records that can be read, by number
    problems: dict[int, list[str]]  # of all records and their parts, by number
    replaced: dict[int, Commit]  # that count no more, by number

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read and check all records and all table parts they name."""
        history = cls(folder, {}, {}, {})
        for number in sorted(commit_numbers(folder)):
            history.problems[number] = []
            try:
                history.commits[number] = Commit.read(commit_path(folder, number))
            except CorruptRun as error:
                history.problems[number].append(str(error))
        history._leave_out_replaced()
        checked: dict[FileRecord, str | None] = {}
        for number, commit in history.commits.items():
            problems = history.problems[number]
            before = history.commits.get(number - 1)
            if commit.number != number or (before and before.sha256 != commit.previous_sha256):
                path = commit_path(folder, number)
                problems.append(f"{path}: does not follow commit {number - 1}")
            for part in commit.parts:
                if part not in checked:
                    checked[part] = part_problem(folder, part)
                if problem := checked[part]:
                    problems.append(problem)
        for number in history._missing():
            history.problems[number] = [f"{commit_path(folder, number)}: is missing"]
        return history

    def _leave_out_replaced(self) -> None:
        keep = self.commits[max(self.commits)].keep if self.commits else 1
        for number in sorted(self.commits)[:-keep]:
            self.replaced[number] = self.commits.pop(number)
            del self.problems[number]

    def _missing(self) -> list[int]:
        """The numbers of records that no commit can have deleted, and that are not there."""
        if not self.commits:
            return []
        first, oldest = min(self.problems), max(n - c.keep for n, c in self.commits.items())
        set_aside = _numbers(self.folder, _SET_ASIDE_NAME)
        # What a commit deleted that cannot be read any more is not known.
        if max(set_aside, default=0) >= first or len(self.commits) <= self.last - first:
            oldest = max(oldest, first)
        expected = set(range(max(0, oldest) + 1, self.last))
        return sorted(expected - self.problems.keys() - set_aside)

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
    # A writer may rename it between two looks.
    if problem and difference(folder, hidden(part)) and difference(folder, part):
        return problem
    return None


def hidden(part: FileRecord) -> FileRecord:
    """A part before its commit, or after one has left it out."""
    return FileRecord(hidden_path(part.path), part.size_bytes, part.sha256)


def hidden_path(part: str) -> str:
    """The path of a part under a name that readers skip."""
    table, name = part.split("/")
    return f"{table}/_{name}{HIDDEN}"


def visible_name(name: str) -> str:
    """The name of a part whose name may be a hidden one."""
    return name.removeprefix("_").removesuffix(HIDDEN)


def commit_numbers(folder: Path) -> set[int]:
    """The numbers of the commit records in a run folder.

    Raises:
        CorruptRun: they cannot be listed.
    """
    return _numbers(folder, _NAME)


def _numbers(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    names = [pattern.fullmatch(name) for name in _names(folder, "commits")]
    return {int(match[1]) for match in names if match}


def _names(run: Path, folder: str) -> list[str]:
    try:
        return LocalFiles(run).list(folder)
    except OSError as error:
        raise CorruptRun(f"{run / folder}: cannot be read: {error.strerror}") from error


def committed_parts(run: Path, table: str) -> list[Path]:
    """The files of a table as of the newest commit, also if its renames are pending.

    So the tables of a run agree with each other at any moment, also after a kill.

    Raises:
        CorruptRun: a part is missing, a file is there that no commit named, or the newest commit
            is damaged.
    """
    for attempt in range(_TRIES):  # A writer may rename a part while its folder is read.
        try:
            return _parts_now(run, table)
        except CorruptRun:
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("not reached")


def _parts_now(run: Path, table: str) -> list[Path]:
    newest = newest_commit(run)
    if newest is None:
        return []
    names = _names(run, table)
    there, found = set(names), {}
    for part in newest.parts:
        name = part.path.removeprefix(f"{table}/")
        if name == part.path:
            continue
        other = hidden_path(part.path).removeprefix(f"{table}/")
        if name in there or other in there:
            found[name] = name if name in there else other
        elif f"{SET_ASIDE}{name}{HIDDEN}" not in there:
            raise CorruptRun(f"{run / table / name}: is missing, though a commit names it")
    for name in names:
        match = _PART_NAME.fullmatch(name)
        # It may be of a commit that came since, or of one before.
        if match and name not in found and int(match[1] or 0) <= newest.number:
            _require_named(run, f"{table}/{name}")
    return [run / table / found[name] for name in sorted(found)]


def _require_named(run: Path, part: str) -> None:
    """Raise CorruptRun if no commit names a part, and all that could can be read."""
    for number in commit_numbers(run):
        try:
            commit = Commit.read(commit_path(run, number))
        except CorruptRun:
            return
        if any(part == named.path for named in commit.parts):
            return
    raise CorruptRun(f"{run / part}: belongs to no commit; move it elsewhere")


def newest_commit(run: Path) -> Commit | None:
    """The newest commit of a run that may be in progress; None if there is none yet.

    Raises:
        CorruptRun: it is damaged.
    """
    number = max(commit_numbers(run), default=0)
    while number:
        try:
            return Commit.read(commit_path(run, number))
        except CorruptRun:
            read, number = number, max(commit_numbers(run), default=0)
            if number == read:  # and not replaced meanwhile
                raise
    return None


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
    raise ConfigError(f"{missing}: is missing, though a commit names it")


def settings_changed(run: Path) -> list[str]:
    """Settings that were changed since a run began, as the command line writes them."""
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
    changed = [*settings_changed(run), *overrides]
    return parse_config(config_text(run), str(run / "config.yaml"), changed)


def config_text(run: Path) -> str:
    """The config that a run was started with, verified against its checksum.

    Raises:
        ConfigError: it was changed, or cannot be read.
    """
    path = run / "config.yaml"
    facts = _run_json(run)
    try:
        with open_inside(run, "config.yaml") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != facts.config_sha256:
        raise ConfigError(
            f"{path}: is not the config that this run was started with; "
            "restore it, or start a new run with the changed one"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error


def run_facts(folder: Path) -> Json:
    """The content of run.json, checked together with config.yaml.

    Raises:
        ConfigError: `folder` is not a run, is of a newer version, or its config was changed.
        CorruptRun: run.json is damaged.
    """
    config_text(folder)
    return asdict(_run_json(folder))


def _run_json(folder: Path) -> _RunJson:
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder}: is not a run folder (it has no run.json)")
    record, _ = read_sealed(folder, "run.json", indent=1)
    return _validated(_RUN_JSON, folder / "run.json", record)


def verify(folder: Path) -> list[str]:
    """Every problem found in a run's records, table parts and checkpoint files.

    Raises:
        ConfigError: `folder` is not a run, or of a newer version.
    """
    before, found = commit_numbers(folder), list(_all_problems(folder))
    for _ in range(_TRIES if found else 0):
        now = commit_numbers(folder)
        if now == before:
            break
        # A commit that came meanwhile has deleted files; what lasts is a problem.
        again = set(_all_problems(folder))
        before, found = now, [problem for problem in found if problem in again]
    return found


def _all_problems(folder: Path) -> Iterator[str]:
    try:
        run_facts(folder)
    except (CorruptRun, ConfigError) as error:
        if not (folder / "run.json").is_file():
            raise
        yield str(error)
    history = History.read(folder)
    yield from dict.fromkeys(p for n in sorted(history.problems) for p in history.problems[n])
    seen: set[FileRecord] = set()
    for commit in reversed(history.commits.values()):
        files = set(commit.files.values())
        yield from (p for f in files - seen if (p := difference(folder, f)))
        seen |= files
    commits = [*history.replaced.values(), *history.commits.values()]
    named = {part.path for commit in commits for part in commit.parts}
    for table in SCHEMAS:
        for name in _names(folder, table):
            if _PART_NAME.fullmatch(name) and f"{table}/{name}" not in named:
                yield f"{folder / table / name}: belongs to no commit"
