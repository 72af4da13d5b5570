"""The meta-controller: takes a run through its stages, over whatever cluster it is given."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from traceback import format_exception
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from dmrl_ray.cluster.placement import place
from dmrl_ray.config.components import did_you_mean
from dmrl_ray.config.loading import resolved
from dmrl_ray.config.machine import usable_cores
from dmrl_ray.config.paths import JOB_VARIABLE
from dmrl_ray.config.schema import Pretrain, RunConfig
from dmrl_ray.control.checks import check, unrepeatable
from dmrl_ray.control.continuation import change, changes, check_state, check_unpickled
from dmrl_ray.control.held_out import evaluation_tasks
from dmrl_ray.control.run_state import Run
from dmrl_ray.control.stages import run_stages
from dmrl_ray.control.stop import StopRequest
from dmrl_ray.control.train_loop import evaluation_calls, program_of
from dmrl_ray.errors import ConfigError, Interrupted, JobLost, StorageError
from dmrl_ray.jobs.liveness import own_environments
from dmrl_ray.jobs.messages import FAULTS, Call
from dmrl_ray.jobs.protocols import map_calls
from dmrl_ray.jobs.spec import Weights, job_spec, load_family
from dmrl_ray.jobs.worker import LocalWorkers, RolloutWorker
from dmrl_ray.results.display import Display
from dmrl_ray.store.commit_records import as_overrides, committed_parts, load_run_config
from dmrl_ray.store.reader import RunReader
from dmrl_ray.store.tables import read_part
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.types import EnvironmentFault, Split, join_rows

if TYPE_CHECKING:
    import pandas as pd

MAX_ROLLBACKS = 10
"""Times one run returns to its newest commit, in one process, after losing a job."""


def run(
    config: RunConfig,
    folder: Path,
    *,
    address: str | None = None,
    overwrite: bool = False,
    display: Display,
) -> Path:
    """Run all stages of a config into a new run folder, and return that folder.

    Raises:
        ConfigError: the folder exists, or the parts of the config do not fit together.
        Interrupted: by Ctrl+C, SIGTERM or SIGHUP, after a clean commit.
    """
    stop = StopRequest(display)
    with stop.caught():
        with stop.abandoning(), _watched(config, display):
            check(config)
            warning = unrepeatable(config)
            config, placement = place(config, address)
        with RunWriter.create(
            folder, resolved(config), facts(config), overwrite=overwrite, keep=config.commit.keep
        ) as writer:
            current = Run(config, writer, display, address, stop)
            if placement:
                current.event("placed", message=placement)
                display.message(placement)
            if warning:
                current.event("not_repeatable", message=warning)
                display.message(f"warning: {warning}")
            _execute(current)
            return writer.folder


def resume(
    folder: Path,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    trust: bool = False,
    display: Display,
) -> Path:
    """Continue a run from its newest complete commit, and return its folder.

    Args:
        folder: of the run.
        config: what it is to go by, as far as a run may change; its own config if None.
        overrides: settings of its own config to change, likewise.
        address: of a Ray cluster.
        trust: allow reading pickles, which algorithms of RLlib keep and which can run code.
        display: shows the progress.

    Raises:
        ConfigError: the folder is no run, or a newer version's, or has to be trusted.
        IncompatibleSettings: the config differs from the run's where a run may not change.
        CorruptRun: none of its commits is complete.
        Interrupted: by Ctrl+C, SIGTERM or SIGHUP, after a clean commit.
    """
    stop = StopRequest(display)
    with stop.caught(), RunWriter.open(folder) as writer:
        check_state(writer)
        before = load_run_config(writer.folder)
        current = Run(before, writer, display, address, stop)
        changed = changes(before, config or load_run_config(folder, overrides), current.state)
        if not trust:
            check_unpickled(current, changed, own_config=config is not None)
        if changed:
            current.config = load_run_config(folder, as_overrides(changed))
            with stop.abandoning(), _watched(current.config, display):
                check(current.config)
        writer.keep = current.config.commit.keep
        for message in writer.recovery:
            current.event("recovered", message=message)
            display.message(message)
        current.event("run_resumed", commit=writer.number)
        if changed:
            change(current, before, changed)
        _execute(current)
        return writer.folder


def evaluate(
    folder: Path,
    *,
    stage: str | None,
    split: Split,
    tasks: int,
    trials: int,
    checkpoint: str,
) -> pd.DataFrame:
    """Play held-out tasks with a policy of a finished stage; writes nothing.

    Raises:
        ConfigError: the run has no such policy yet.
    """
    import pandas as pd

    run = RunReader(folder)
    config = load_run_config(folder)
    trained = [n for n, s in config.stages.items() if isinstance(s, Pretrain)]
    ready = [n for n in trained if f"{n}.{checkpoint}" in run.files]
    name = stage or (ready[-1] if ready else "")
    if name and name not in trained:
        hint = did_you_mean(name, trained) or f"; there are: {', '.join(trained)}"
        raise ConfigError(f"command line: --stage: {name!r} trains no policy{hint}")
    if name not in ready:
        raise ConfigError(
            f"{folder}: stage {name or 'any'!r} has no {checkpoint!r} policy yet; "
            f"there are policies of: {', '.join(ready) or 'no stage'}"
        )
    weights = run.load(f"{name}.{checkpoint}")  # Before its version: a commit may come between.
    policy = Weights(run.version(f"{name}.{checkpoint}"), weights)
    spec = job_spec(config, name)
    drawn = evaluation_tasks(load_family(config.tasks), config.evaluation_seed, split, tasks)
    calls = evaluation_calls(
        spec, program_of(spec), drawn, trials=trials, greedy=True, policy_version=policy.version
    )
    played = dict(
        map_calls(LocalWorkers(), [Call(RolloutWorker.evaluate, (call, policy)) for call in calls])
    )
    rows = join_rows([played[i] for i in range(len(calls))])
    rows.pop(FAULTS, None)  # They are counted in runs alone.
    rows["env_steps"][:] = _env_steps(folder, name, policy.version)
    return pd.DataFrame(rows).assign(
        run_id=run.run_id, stage=name, algorithm=spec.algorithm_name, seed=config.seed
    )


def _env_steps(folder: Path, stage: str, version: int) -> int:
    """Environment steps of a stage's training until a policy was made."""
    wanted = (pc.field("stage") == stage) & (pc.field("policy_version") == version)
    columns = ("stage", "policy_version", "env_steps")
    for part in committed_parts(folder, "metrics"):
        rows = read_part(part, "metrics", columns).filter(wanted)
        if len(rows):
            return int(rows["env_steps"][0].as_py())
    return 0


def facts(config: RunConfig) -> dict[str, object]:
    """The software, the machine and the job that a run belongs to, as run.json has them."""
    packages = ("dmrl-ray", "ray", "torch", "gymnasium", "numpy", "pandas", "pyarrow")
    return {
        "name": config.name,
        "seed": config.seed,
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "git": _git(),
        "host": platform.node(),
        "machine": platform.machine(),
        "cpus": usable_cores(),
        "ray_job_id": _ray_job_id(),
    }


def _execute(run: Run) -> None:
    """Run all stages that are not done yet; a lost job returns to the newest commit."""
    rollbacks = 0
    try:
        while True:
            try:
                with _watched(run.config, run.display):
                    run_stages(run)
                return
            except JobLost as error:
                rollbacks += 1
                run.check()
                if rollbacks > MAX_ROLLBACKS:
                    raise
                run.rollback()
                run.restart_workers()
                run.event("rollback", commit=run.writer.number, reason=str(error))
                run.display.message(f"{error}; continuing from commit {run.writer.number}")
    except Interrupted as error:  # No failure: what was done is committed.
        _note_end(run, "interrupted", reason=str(error))
        raise
    except Exception as error:  # Recorded, and reported by the caller.
        failure = {"error": type(error).__name__, "reason": str(error)}
        fault = error if isinstance(error, EnvironmentFault) else None
        text = "".join(format_exception(error))
        _note_end(run, "run_failed", fault, **failure, traceback=text)
        raise
    finally:
        run.close()


def _watched(config: RunConfig, display: Display) -> AbstractContextManager[None]:
    """Watch the environments that this process itself plays."""
    family = f"task family {config.tasks.type!r}"
    return own_environments(family, config.environments.timeout_s, display.message)


def _note_end(run: Run, event: str, fault: EnvironmentFault | None = None, **detail: str) -> None:
    """Return to the newest commit, and add one that says why the run ends there."""
    run.rollback()
    if fault is not None:
        run.note_fault(fault)
    run.event(event, run.next_stage(), **detail)
    with suppress(StorageError):
        run.commit()


def _ray_job_id() -> str | None:
    """The submission id, in a process that `ray job submit` started."""
    job = json.loads(os.environ.get(JOB_VARIABLE) or "{}")
    submission_id: str | None = job.get("metadata", {}).get("job_submission_id")
    return submission_id


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """The commit of the source checkout, with a + if it was changed."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
