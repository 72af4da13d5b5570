"""Held-out tasks: which are evaluated on, and that nothing is learned from them unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmrl_ray.config.schema import Adapt, Finetune, Pretrain, RunConfig, Stage
from dmrl_ray.data.lineage import learned_from, stage_lineage
from dmrl_ray.data.sources import DataSettings, recordings_of
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import sample
from dmrl_ray.types import Split, Task, random_stream

TASK_BLOCK = 64
"""Tasks are drawn in blocks of this size, so that the first n are the same for every n."""


def evaluation_tasks(family: TaskDistribution, seed: int, split: Split, n: int) -> list[Task]:
    """The first n evaluation tasks of a split: the same in every stage of every run of the seed."""
    tasks: list[Task] = []
    for block in range((n + TASK_BLOCK - 1) // TASK_BLOCK):
        stream = random_stream(seed, "evaluation tasks", split, block)
        tasks += sample(family, stream, TASK_BLOCK, split)
    return tasks[:n]


def check_seen(
    config: RunConfig, name: str, learns_from: Mapping[str, DataSettings], family: TaskDistribution
) -> None:
    """See that no stage selects or reports on held-out tasks that its policy learned from.

    Args:
        config: of the run.
        name: of the stage that learns.
        learns_from: its recordings, by the setting of its algorithm that names them.
        family: of the run.

    Raises:
        ValueError: one does, and the stage that learns does not say ``allow_seen: true``.
    """
    stage = config.stages[name]
    if not isinstance(stage, (Pretrain, Finetune)):
        return
    if stage.allow_seen:
        if not learns_from:
            raise ValueError("allow_seen: this stage learns from no recordings; leave it out")
        return
    starts = {key: _starts(config, other) for key, other in config.stages.items()}
    later = [key for key in config.stages if name in stage_lineage(starts, key)]
    for field, data in learns_from.items():
        recorded = _recorded(config, data, family)
        for key in later if recorded else ():
            tasks = {task.id for task in _held_out(config, config.stages[key], family)}
            if seen := len(tasks & recorded):
                does = "selects" if isinstance(config.stages[key], Pretrain) else "reports"
                raise ValueError(
                    f"algorithm.{field}: {seen} of the {len(tasks)} tasks that stage {key!r} "
                    f"{does} on are in these recordings; record split: train, or say "
                    "allow_seen: true here"
                )


def _recorded(config: RunConfig, data: DataSettings, family: TaskDistribution) -> set[str]:
    """Ids of the validation and test tasks in recordings, as far as they can be known."""
    if data.runs:
        trained = learned_from(data, Path())
        return {task_id for task_id, split in trained.tasks if split != "train"}
    stage = None if data.stage is None else config.stages[data.stage]
    if stage is None or isinstance(stage, Pretrain):  # which records its training
        return set()
    return {task.id for task in _held_out(config, stage, family)}


def _starts(config: RunConfig, stage: Stage) -> list[str | None]:
    """The stages that a stage starts from, or learns from the recordings of."""
    algorithm = getattr(stage, "algorithm", None) or config.algorithm
    data = recordings_of(algorithm.settings) if isinstance(stage, (Pretrain, Finetune)) else {}
    return [getattr(stage, "init_from", None), *(d.stage for d in data.values() if not d.runs)]


def _held_out(config: RunConfig, stage: Stage, family: TaskDistribution) -> list[Task]:
    """Validation or test tasks that a stage plays."""
    split: Split = "validation" if isinstance(stage, Pretrain) else stage.split
    if isinstance(stage, Pretrain):
        n = stage.validation_tasks
    elif isinstance(stage, Adapt):
        n = stage.streams * stage.tasks_per_stream
    else:
        n = stage.tasks
    if split == "train":
        return []
    return evaluation_tasks(family, config.evaluation_seed, split, n)
