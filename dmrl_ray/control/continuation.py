"""Settings that may change when a run is resumed, and the stages that are played again for it.

Budgets of training may grow: a stage that is done is trained on, and later stages that start from
it, or learn from what it recorded, start from scratch. Settings that change the speed alone may
change. Everything else would make one run of two, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmrl_ray.config.loading import expanded, plain
from dmrl_ray.config.schema import RLLIB, Pretrain, RunConfig
from dmrl_ray.control.run_state import Run
from dmrl_ray.data.sources import recordings_of
from dmrl_ray.errors import ConfigError, CorruptRun, IncompatibleSettings
from dmrl_ray.jobs.external import ExternalAlgorithm
from dmrl_ray.jobs.spec import job_spec
from dmrl_ray.store.commit_records import as_overrides
from dmrl_ray.store.writer import RunWriter

SPEED_ALONE = (
    "workers.*",  # A shard is the same on any worker.
    "commit.*",  # A run continues exactly from any commit.
    "environments.*",  # Nothing depends on them until an environment fails.
    "algorithm.*.memory_mb",  # What of recordings is kept in memory; the rest is read again.
    "stages.*.algorithm.*.memory_mb",
)
"""Settings that change how fast a run is and never its result. None of `learners` is among them:
number, threads, device, precision and compiler change the last bits, if not more."""

RESOLVED = ("workers.num", "learners.threads")
"""Settings whose ``auto`` means what the run chose when it started."""

_ABSENT = object()


def changes(before: RunConfig, after: RunConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which a resumed run may differ, by their dotted names.

    Args:
        before: what the run has gone by.
        after: what it is to go by.
        state: of its newest commit.

    Raises:
        IncompatibleSettings: there are others, each of which is named with both values.
    """
    allowed: dict[str, Any] = {}
    problems = []
    for path, old, new in _differences(plain(expanded(before)), plain(expanded(after))):
        name = ".".join(path)
        if name in RESOLVED and new == "auto":
            continue
        if wrong := _refusal(path, old, new, before, state):
            problems.append(("", f"{name}: {wrong}"))
        else:
            allowed[name] = new
    if not problems and list(before.stages) != list(after.stages):
        order = ", ".join(before.stages)
        problems.append(("", f"stages: this run has another order of them: {order}; keep it"))
    if problems:
        raise IncompatibleSettings(problems)
    return allowed


def _differences(
    old: Any, new: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Paths at which two configs differ; a class in place of another is one difference."""
    sections = isinstance(old, dict) and isinstance(new, dict)
    if sections and old.get("type") == new.get("type"):
        for key in old | new:
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), (*path, key))
    elif repr(old) != repr(new):
        yield path, old, new


def _refusal(
    path: tuple[str, ...], old: Any, new: Any, before: RunConfig, state: Mapping[str, Any]
) -> str | None:
    """The reason why a run cannot continue with this, or None."""
    if any(fnmatchcase(".".join(path), pattern) for pattern in SPEED_ALONE):
        return None
    found = f"found {_shown(new)}, and this run has {_shown(old)}"
    stage = path[1] if len(path) == 3 and path[0] == "stages" and path[2] == "env_steps" else ""
    if not isinstance(before.stages.get(stage), Pretrain):
        return f"{found}; leave it as it is, or start another run in another folder"
    if new < old:
        return f"{found}; a budget may grow and not shrink"
    if stage in state["done"] and stage not in state["jobs"]:
        return f"{found}, whose learner's state was not kept; start another run in another folder"
    return None


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "none"
    if isinstance(value, dict) and "type" in value:
        value = value["type"]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


Step = Annotated[int, Field(ge=0, lt=2**63)]


class _State(BaseModel):
    """The state of a run in its commits, as `Run` has it."""

    model_config = ConfigDict(strict=True)

    done: list[str] = []
    jobs: dict[str, _Progress | list[str]] = {}  # of training, of fine-tuning
    versions: dict[str, Step] = {}
    changed: dict[str, object] = {}
    faults: Step = 0
    quarantined: list[str] = []
    job: _Progress | list[str] | None = None


class _Progress(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    updates: Step
    env_steps: Step
    best_score: float | None
    best_version: Step
    seconds: float
    validation_due: bool = False


def check_state(writer: RunWriter) -> None:
    """See that the state in the newest commit is one of a run.

    Raises:
        CorruptRun: it is not.
    """
    try:
        _State.model_validate(writer.state or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("state", *first["loc"])))[:80]
        raise CorruptRun(
            f"{writer.folder}: commit {writer.number} is damaged: {where}: {first['msg']}"
        ) from error


def check_unpickled(run: Run, changed: Mapping[str, Any], *, own_config: bool) -> None:
    """See that a resumed run reads no pickle that its folder chose.

    Args:
        run: as its newest commit has it.
        changed: settings that change, as `changes` found them.
        own_config: the user gave the config, which names checkpoints of RLlib and trusts them.

    Raises:
        ConfigError: it would.
    """
    for name, stage in run.config.stages.items():
        kept = name in run.state["jobs"] and isinstance(stage, Pretrain)
        goes_on = name not in run.state["done"] or f"stages.{name}.env_steps" in changed
        algorithm = job_spec(run.config, name).algorithm.load("algorithm")
        if kept and goes_on and issubclass(algorithm, ExternalAlgorithm):
            found = "the state of its algorithm"
        elif (
            str(stage.init_from).startswith(RLLIB)
            and not own_config
            and (changed or (goes_on and f"{name}.start" not in run.files))
        ):
            found = f"init_from: {stage.init_from}"
        else:
            continue
        raise ConfigError(
            f"{run.writer.folder}: stage {name!r}: {found} is of RLlib, whose checkpoints are "
            "pickles, which can run code when they are read; if you trust where this folder is "
            "from, resume it with --trust"
        )


def change(run: Run, before: RunConfig, changed: Mapping[str, Any]) -> None:
    """Make changed settings, and what they bring about, part of a run, in one commit.

    Args:
        run: with the config that it is to go by.
        before: the config that it has gone by.
        changed: the differences, as `changes` found them.
    """
    run.state["changed"] |= changed
    run.event("settings_changed", message=", ".join(as_overrides(changed)))
    grown = [name for name in before.stages if f"stages.{name}.env_steps" in changed]
    reopened = {name for name in grown if name in run.state["done"]}
    again = [name for name in depending(run.config, reopened) if _is_begun(run, name)]
    for name in grown:
        _tell(run, "training_extended", name, _what_follows(run, before, name, again))
        if _is_begun(run, name) and (reasons := _deviations(run, name)):
            _tell(
                run,
                "extension_not_exact",
                name,
                f"stage {name!r} will not end as if it had the larger budget from the start: "
                + ", and ".join(reasons),
            )
    if again:
        run.play_again(again)
    run.state["done"] = [name for name in run.state["done"] if name not in reopened]
    run.commit()


def _tell(run: Run, event: str, stage: str, message: str) -> None:
    run.event(event, stage, message=message)
    run.display.message(message)


def depending(config: RunConfig, stages: set[str]) -> list[str]:
    """Stages that start from one of these or learn from its recordings, directly or not."""
    found: list[str] = []
    for name, stage in config.stages.items():
        recordings = recordings_of(job_spec(config, name).algorithm.settings).values()
        sources = {data.stage for data in recordings if not data.runs} | {stage.init_from}
        if sources & {*stages, *found}:
            found.append(name)
    return found


def _is_begun(run: Run, stage: str) -> bool:
    return stage in run.state["done"] or stage in run.state["jobs"]


def _what_follows(run: Run, before: RunConfig, name: str, again: list[str]) -> str:
    old, new = (config.stages[name].env_steps for config in (before, run.config))  # type: ignore[union-attr]
    message = f"stage {name!r} trains for {new:,} environment steps instead of {old:,}"
    follow = [stage for stage in depending(run.config, {name}) if stage in again]
    return message + (f"; played again: {', '.join(follow)}" if follow else "")


def _deviations(run: Run, name: str) -> list[str]:
    """Why a stage that has begun ends otherwise than with its larger budget from the start."""
    stage, algorithm = run.config.stages[name], job_spec(run.config, name).algorithm
    assert isinstance(stage, Pretrain)
    reasons = [
        f"{schedule} went by the smaller budget until here"
        for schedule in algorithm.load().schedules(algorithm.settings)
    ]
    if name in run.state["done"] and run.state["jobs"][name]["updates"] % stage.validate_every:
        reasons.append("the policy that ended the smaller one was validated, too, and may be best")
    if issubclass(algorithm.load(), ExternalAlgorithm):
        reasons.append("its library keeps a part of its state to itself")
    if stage.max_policy_lag:
        reasons.append("rollouts in flight start from scratch")
    return reasons
