"""Where configs, runs and clusters are that a user names in short, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import dmrl_ray
from dmrl_ray.config.components import did_you_mean
from dmrl_ray.errors import ConfigError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit`, for what the job runs."""


def find_cluster(address: str | None) -> str | None:
    """Of a running cluster: the address given, that of the environment, or the surrounding Ray
    job's; None where Ray is to be started on this machine."""
    inside_job = JOB_VARIABLE in os.environ
    found = address or os.environ.get("RAY_ADDRESS") or ("auto" if inside_job else "local")
    return None if found == "local" else found


def packaged_configs() -> dict[str, Path]:
    """Files of the configs that come with the package, by name."""
    return {
        file.stem: file
        for root in reversed(list(dmrl_ray.__path__))
        for file in (Path(root) / "configs").glob("*.yaml")
    }


def runs_here() -> dict[str, Path]:
    """Folders of the runs in ``runs/``, by name."""
    return {file.parent.name: file.parent for file in Path("runs").glob("*/run.json")}


def find_config(name: str) -> Path:
    """The file of that path, or the packaged config of that name.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    found = packaged_configs()
    if name in found:
        return found[name]
    known = f"; packaged configs: {', '.join(sorted(found)) or 'none'}"
    raise ConfigError(f"{name}: there is no such file{did_you_mean(name, found) or known}")


def find_run(name: str) -> Path:
    """The run folder of that path, or the run in ``runs/`` whose name starts so.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if (Path(name) / "run.json").is_file():
        return Path(name).absolute()
    runs = runs_here()
    found = [run for run in sorted(runs) if run.startswith(name)]
    if name in runs or len(found) == 1:
        return runs[name if name in runs else found[0]].absolute()
    if found:
        raise ConfigError(f"{name}: more than one run starts so: {', '.join(found)}")
    if Path(name).is_dir():
        raise ConfigError(f"{name}: is no run, it has no run.json")
    raise ConfigError(f"{name}: there is no such run{did_you_mean(name, runs)}")
