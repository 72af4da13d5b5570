"""Computes the figures of the runs of one config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dmrl_ray.config.schema import Evaluate, Finetune, Pretrain, RunConfig
from dmrl_ray.jobs.spec import job_spec, load_family
from dmrl_ray.results.intervals import method_interval
from dmrl_ray.results.reading import load, starts
from dmrl_ray.store.commit_records import load_run_config

KEPT = ["stage", "seed", "task_id", "trial", "adaptation_step", "episode", "return"]
"""Columns of the Parquet file of a result."""

SAMPLED = 500
"""Number of held-out tasks over which references are averaged."""


def figures(folders: Sequence[Path]) -> dict[str, object]:
    """Returns the results and training costs of every stage that reports on held-out tasks.

    Args:
        folders: finished runs of one config with different seeds.
    """
    config = load_run_config(folders[0])
    episodes = pd.concat([load(folder) for folder in folders])
    events = pd.concat([load(folder, table="events") for folder in folders])
    stages: dict[str, object] = {}
    for name, stage in config.stages.items():
        if not isinstance(stage, (Evaluate, Finetune)):
            continue
        spec = job_spec(config, name)
        whole = bool(spec.algorithm.load().memory_spans_trial)
        rows = episodes[episodes["stage"] == name]
        stages[name] = {
            "method": spec.algorithm_name,
            "measure": "return of a trial" if whole else "return at the last step",
            **returns(rows, whole=whole),
            **reference_points(config, whole=whole),
            **cost(events, sources(config, name)),
        }
    return {"problem": load_family(config.tasks).family, "stages": stages, **machine(folders[0])}


def write_episodes(folders: Sequence[Path], path: Path) -> None:
    """Writes the returns of all episodes of the reported stages."""
    stages = load_run_config(folders[0]).stages
    reported = [name for name, stage in stages.items() if isinstance(stage, (Evaluate, Finetune))]
    episodes = pd.concat([load(folder) for folder in folders])
    rows = episodes.loc[episodes["stage"].isin(reported), KEPT]
    rows.astype({"return": "float32"}).to_parquet(path, compression="zstd", index=False)


def returns(rows: pd.DataFrame, *, whole: bool) -> dict[str, object]:
    """Returns the mean return with its 95 % interval over training seeds, by seed and by step.

    Args:
        whole: sum over the adaptation steps of a trial instead of using only the last.
    """
    rows = rows.assign(start=starts(rows))
    by_step = rows.groupby("adaptation_step")[["return", "score"]].mean().round(4)
    counted = rows if whole else rows[rows["adaptation_step"] == rows["adaptation_step"].max()]
    start = ["seed", "task_id", "start"]
    trials = counted.groupby([*start, "adaptation_step"])["return"].mean().groupby(start).sum()
    table = trials.unstack(["task_id", "start"])
    seeds = table.mean(axis=1)
    low, high = method_interval(table.to_numpy(float))
    return {
        "mean": round(float(seeds.mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "per_seed": [round(float(x), 4) for x in seeds],
        "per_step": by_step["return"].to_dict(),
        "score_per_step": by_step["score"].to_dict(),
        "tasks": round(len(trials) / len(table)),
    }


def reference_points(config: RunConfig, *, whole: bool) -> dict[str, float]:
    """Returns mean returns of the random policy and the oracle, if the family has references."""
    family = load_family(config.tasks)
    tasks = family.sample(np.random.default_rng(config.seed), SAMPLED, "test")
    known = [ends for task in tasks if (ends := family.reference(task)) is not None]
    if not known:
        return {}
    return {
        name: round(
            float(
                np.mean([e.sum() if whole else e[-1] for e in (getattr(k, name) for k in known)])
            ),
            4,
        )
        for name in ("random", "oracle")
    }


def sources(config: RunConfig, name: str) -> Iterator[str]:
    """Yields the stages that trained the initial policy of a stage."""
    source = getattr(config.stages[name], "init_from", None)
    while source is not None:
        yield source
        stage = config.stages[source]
        source = stage.init_from if isinstance(stage, Pretrain) else None


def cost(events: pd.DataFrame, stages: Iterator[str]) -> dict[str, object]:
    """Returns the mean environment steps and each seed's seconds of training."""
    ended = events[events["stage"].isin(list(stages)) & (events["event"] == "job_finished")]
    ended = ended.drop_duplicates(
        ["run_id", "stage"], keep="last"
    )  # A job may be trained further later.
    details = pd.DataFrame([json.loads(detail) for detail in ended["detail"]])
    sums = details.groupby(ended["run_id"].to_numpy(), sort=False)[["env_steps", "seconds"]].sum()
    return {
        "env_steps": int(sums["env_steps"].mean()),
        "seconds": [round(seconds) for seconds in sums["seconds"]],
    }


def machine(folder: Path) -> dict[str, object]:
    """Returns the machine, the processes and the commit of a run."""
    facts = json.loads((folder / "run.json").read_text())["facts"]
    config = load_run_config(folder)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or facts["machine"],
        "cores": facts["cpus"],
        "workers": config.workers.num,
        "threads": config.learners.threads,
        "torch": facts["versions"]["torch"],
        "commit": facts["git"] or "unknown",
    }
