"""Reads a run without a lock and without a change: of others, read-only, or in progress."""

from __future__ import annotations

from pathlib import Path

from dmrl_ray.errors import ConfigError
from dmrl_ray.store.commit_records import Commit, newest_commit, run_facts
from dmrl_ray.store.files import FileRecord, LocalFiles, load_arrays
from dmrl_ray.types import Arrays

_TRIES = 5


class RunReader:
    """The checkpoints of a run as of its newest commit.

    Raises:
        ConfigError: the folder is no run, of a newer version, or its config was changed.
        CorruptRun: run.json or the newest commit is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = str(run_facts(folder)["run_id"])
        self._commit: Commit | None = newest_commit(folder)

    @property
    def files(self) -> dict[str, FileRecord]:
        """The checkpoint files in use, by name."""
        return self._commit.files if self._commit is not None else {}

    def version(self, name: str) -> int:
        """Updates that made a policy."""
        versions = self._commit.state.get("versions") if self._commit is not None else None
        version = versions.get(name, 0) if isinstance(versions, dict) else 0
        return version if isinstance(version, int) and 0 <= version < 2**63 else 0

    def load(self, name: str) -> Arrays:
        """The arrays of a checkpoint file.

        A commit that comes meanwhile may delete it; then it is that of the commit that came.

        Raises:
            ConfigError: the newest commit has no such file.
            ValueError: it is missing or damaged.
        """
        for attempt in range(_TRIES):
            if name not in self.files:
                raise ConfigError(f"{self.folder}: has no checkpoint {name!r} any more")
            try:
                return load_arrays(LocalFiles(self.folder), self.files[name])
            except ValueError:
                before, self._commit = self._commit, newest_commit(self.folder)
                if attempt == _TRIES - 1 or self._commit == before:
                    raise
        raise AssertionError("not reached")
