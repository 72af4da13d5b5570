"""Finds configs, runs and clusters by the short names that a user gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

import dmrl_ray
from dmrl_ray.config.components import did_you_mean
from dmrl_ray.errors import ConfigError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that `ray job submit` sets in a job."""


def find_cluster(address: str | None) -> str | None:
    """Returns the address of a running cluster; None if Ray is to be started on this machine.

    Args:
        address: the address given by the user; None takes the one of the environment, or of the Ray
            job that this process runs in.
    """
    inside_job = JOB_VARIABLE in os.environ
    found = address or os.environ.get("RAY_ADDRESS") or ("auto" if inside_job else "local")
    return None if found == "local" else found


def packaged_configs() -> dict[str, Path]:
    """Returns the files of the configs in the package, by name."""
    return {
        file.stem: file
        for root in reversed(list(dmrl_ray.__path__))
        for file in (Path(root) / "configs").glob("*.yaml")
    }


def runs_here() -> dict[str, Path]:
    """Returns the folders of the runs in ``runs/``, by name."""
    return {file.parent.name: file.parent for file in Path("runs").glob("*/run.json")}


@contextmanager
def new_run_folder(name: str) -> Iterator[Path]:
    """Makes a folder in ``runs/`` of this name and the time, for one run; deletes it if empty."""
    at = f"{name[:44]}-{datetime.now():%Y%m%d-%H%M%S}"  # A run's name has at most 64 letters.
    Path("runs").mkdir(exist_ok=True)
    for number in count(1):
        folder = Path("runs") / (at if number == 1 else f"{at}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    try:
        yield folder
    finally:
        with suppress(OSError):  # It has a run in it.
            folder.rmdir()


def find_config(name: str) -> Path:
    """Returns the file with this path, or the packaged config with this name.

    Raises:
        ConfigError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    found = packaged_configs()
    if name in found:
        return found[name]
    known = f"; packaged configs: {', '.join(sorted(found)) or 'none'}"
    raise ConfigError(f"{name}: there is no such file{did_you_mean(name, found) or known}")


def find_run(name: str) -> Path:
    """Returns the run folder with this path, or the run in ``runs/`` whose name starts so.

    Raises:
        ConfigError: no run matches, or more than one.
    """
    if (Path(name) / "run.json").is_file():
        return Path(name).absolute()
    runs = runs_here()
    found = [run for run in sorted(runs) if run.startswith(name)]
    if name in runs or len(found) == 1:
        return runs[name if name in runs else found[0]].absolute()
    if found:
        raise ConfigError(f"{name}: matches more than one run: {', '.join(found)}")
    if Path(name).is_dir():
        raise ConfigError(f"{name}: is not a run folder: it has no run.json")
    raise ConfigError(f"{name}: there is no such run{did_you_mean(name, runs)}")
