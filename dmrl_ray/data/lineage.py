"""The tasks that policies were trained on, in their own training and through recordings.

They are stored while a run goes, so that later changes of recordings do not matter. The table
``trained_on`` has the tasks of every training stage: those it was trained on, those in its
recordings, and those that the recorded policies were trained on. The event ``learned_from`` holds
the location of the recordings.
"""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dmrl_ray.config.yaml_text import parse
from dmrl_ray.data.files import Recorded
from dmrl_ray.data.sources import DataSettings
from dmrl_ray.errors import ConfigError
from dmrl_ray.store.commit_records import config_text, read_committed, run_facts, settings_changed
from dmrl_ray.store.tables import read_part


@dataclass(frozen=True)
class Trained:
    """The tasks and data that a policy was trained on.

    Attributes:
        tasks: id and split of each task.
        complete: False if there may be others, as for external data.
        allowed_by: a stage in its lineage with ``allow_seen``; "" if there is none.
        runs: ids of the runs whose recordings it learned from.
    """

    tasks: frozenset[tuple[str, str]] = frozenset()
    complete: bool = True
    allowed_by: str = ""
    runs: tuple[str, ...] = ()


class _LearnedFrom(BaseModel):
    """The part of the event ``learned_from`` that is read."""

    complete: bool
    allowed_by: str


class Lineage:
    """The tasks that the policies of a run were trained on, as of its newest commit.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run_id = str(run_facts(run)["run_id"])
        self._stages: dict[str, dict[str, Any]] = run_config(run).get("stages", {})
        self._tasks: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for stage, *task in _rows(run, "trained_on", ("stage", "task_id", "split")):
            self._tasks[stage].add((task[0], task[1]))
        self._learned: dict[str, list[_LearnedFrom]] = defaultdict(list)
        for event, stage, detail in _rows(run, "events", ("event", "stage", "detail")):
            if event == "learned_from":
                try:
                    self._learned[stage].append(_LearnedFrom.model_validate_json(detail))
                except ValidationError as error:
                    raise ConfigError(f"{run}: the event learned_from is damaged") from error

    def of(self, stage: str) -> Trained:
        """Returns what the policy of a stage was trained on, in all stages of its lineage."""
        starts = {key: [settings.get("init_from")] for key, settings in self._stages.items()}
        tasks: set[tuple[str, str]] = set()
        complete, allowed_by = True, ""
        for name in stage_lineage(starts, stage):
            settings, learned = self._stages.get(name, {}), self._learned[name]
            tasks |= self._tasks[name]
            # A pretrained stage without tasks is from a version that did not store them.
            known = settings.get("type") != "pretrain" or bool(self._tasks[name] or learned)
            here = (settings.get("init_from") or name) in self._stages
            complete = complete and known and here and all(d.complete for d in learned)
            allowing = [name] if settings.get("allow_seen") else [d.allowed_by for d in learned]
            allowed_by = allowed_by or next(filter(None, allowing), "")
        return Trained(frozenset(tasks), complete, allowed_by)


def stage_lineage(starts: Mapping[str, Sequence[str | None]], stage: str) -> list[str]:
    """Returns a stage and those that its policy descends from, newest first.

    Args:
        starts: for each stage, those that it starts or learns from.
        stage: the newest stage.
    """
    found = [stage]
    for name in found:  # Grows during the iteration.
        parents = (s for s in starts.get(name, ()) if s is not None and s in starts)
        found += [parent for parent in parents if parent not in found]
    return found


def learned_from(data: DataSettings, run: Path) -> Trained:
    """Returns what a stage that learns from data is trained on, including the recorded policies.

    Args:
        data: the data settings of the stage.
        run: the run folder of the stage.

    Raises:
        ValueError: no transitions were recorded.
    """
    if not (data.stage or data.runs):
        return Trained(complete=False)
    patterns = data.runs or (glob.escape(str(run)),)
    sources = Recorded(patterns, data.stage).sources()
    folders = [Path(path) for pattern in patterns for path in glob.glob(pattern)]
    lineages = [Lineage(folder) for folder in folders if (folder / "run.json").is_file()]
    own = Lineage(run).run_id if (run / "run.json").is_file() else ""
    tasks = {(task_id, split) for _, _, task_id, split in sources}
    complete, allowed_by = True, ""
    made_by = {(run_id, stage) for run_id, stage, _, _ in sources}
    for lineage in {lineage.run_id: lineage for lineage in lineages}.values():
        for stage in sorted(stage for run_id, stage in made_by if run_id == lineage.run_id):
            before = lineage.of(stage)
            tasks |= before.tasks
            complete = complete and before.complete
            elsewhere = "" if lineage.run_id == own else f" of {lineage.run_id}"
            allowed_by = allowed_by or (before.allowed_by and before.allowed_by + elsewhere)
    return Trained(
        frozenset(tasks), complete, allowed_by, tuple(sorted({run_id for run_id, _ in made_by}))
    )


def run_config(run: Path) -> dict[str, Any]:
    """Returns the settings of a run with later overrides, without importing what they name.

    Raises:
        ValueError: the config is damaged, or no config of a run.
    """
    path = run / "config.yaml"
    document = parse(str(path), config_text(run))
    for override in settings_changed(run) if isinstance(document.data, dict) else ():
        document.override(override)
    if document.problems:
        raise ConfigError(document.problems[0].text)
    if document.data is None:
        return {}
    try:
        _Outline.model_validate(document.data)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"{path}: {where}: {error.errors()[0]['msg']}") from error
    return dict(document.data)


class _StageOutline(BaseModel):
    """The part of a stage that is read without its class."""

    type: str = ""
    split: str = ""
    init_from: str | None = None
    streams: int = 1
    tasks_per_stream: int = 1
    tasks: int = 1


class _Outline(BaseModel):
    stages: dict[str, _StageOutline] = {}


def _rows(run: Path, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    def read(paths: list[Path]) -> list[tuple[Any, ...]]:
        parts = [read_part(path, table, columns).to_pydict() for path in paths]
        return [row for part in parts for row in zip(*part.values(), strict=True)]

    return read_committed([run], table, read)
