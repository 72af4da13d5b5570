"""Faults of environments, played again.

Where a family steps its environments one by one, the table of events has the seed and the actions
of the episode, which is played alone. Elsewhere environments are stepped together, with random
numbers in common: a copy of the run goes on from its newest commit until the fault shows again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dmrl_ray.control.controller import resume
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import load_family
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import load_run_config


def find_fault(folder: Path, number: int | None) -> Mapping[str, Any]:
    """A fault of a run, as the table of events has it.

    Args:
        folder: of the run.
        number: of the fault, from 1; None is the newest.

    Raises:
        ConfigError: there is no such fault.
    """
    events = load(folder, table="events")
    details = events.loc[events["event"] == "environment_fault", "detail"]
    faults = {fault["number"]: fault for fault in map(json.loads, details)}
    if not faults:
        raise ConfigError(f"{folder}: no environment of this run has failed")
    number = max(faults) if number is None else number
    if number not in faults:
        raise ConfigError(
            f"command line: EVENT: there is no fault {number}; there are {min(faults)} to "
            f"{max(faults)}"
        )
    return cast(Mapping[str, Any], faults[number])


def reproduce(folder: Path, fault: Mapping[str, Any]) -> None:
    """Play what led to a fault; returns if it does not show again. Writes nothing to the run.

    Raises:
        EnvironmentFault: it shows again.
    """
    if "actions" in fault:
        family = load_family(load_run_config(folder).tasks)
        family.play_again(fault["params"], fault["episode_seed"], fault["actions"])
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, folder.name)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("lock"))
        resume(copy, overrides=["workers.num=0"], display=Display(quiet=True))
