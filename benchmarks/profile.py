"""Where the time of a run's training went, from its metrics.

`dmrl_ray.control.train_loop` says what they are.

    python -m benchmarks.profile runs/NAME

For every stage that trained, shares of the time of the driver, of a rollout worker and of the
learner; each column adds up to 100 %. What the driver waits for rollouts is shared out as a
worker's time, if nothing else went on meanwhile; what is left of it is the way to the worker and
back, and shards that took longer than others. With `max_policy_lag` rollouts go on during updates,
and the driver just waits. In one process all three are the same, taking turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from dmrl_ray.config.paths import find_run
from dmrl_ray.config.schema import Pretrain
from dmrl_ray.jobs.spec import job_spec
from dmrl_ray.results.reading import load
from dmrl_ray.store.commits import load_run_config

Shares: TypeAlias = dict[str, dict[str, float]]
"""By process, then by what it did."""

ROWS = {
    "env": "environments",
    "inference": "policy",
    "rest": "rest of the rollouts",
    "transfer": "transfer",
    "learning": "learning",
    "writing": "writing",
    "validation": "validation",
    "waiting": "waiting",
    "other": "other",
}


def shares(seconds: pd.Series[Any], *, parallel: int, overlapped: bool) -> Shares:
    """What each process did with its time.

    Args:
        seconds: sums over all updates, named as the metrics are but without ``time/`` and ``_s``;
            ``wall`` is the time of all.
        parallel: shards that are played at the same time.
        overlapped: rollouts go on during updates.
    """
    wall = float(seconds["wall"])
    rollouts = {
        "env": seconds["env"] / parallel,
        "inference": seconds["inference"] / parallel,
        "rest": (seconds["shards"] - seconds["env"] - seconds["inference"]) / parallel,
    }
    busy = sum(rollouts.values())
    validated = seconds.get("validate", 0.0)  # It may never have been due.
    waited = seconds["learner_wait"] - seconds["write"] - validated
    driver = {
        "learning": seconds["update"],
        "transfer": seconds["learner_call"] - seconds["update"],
        "writing": seconds["write"],
        "validation": validated,
        "other": wall - seconds["learner_wait"] - seconds["learner_call"],
    }
    if overlapped:
        driver["waiting"] = waited
    else:
        played = min(1.0, waited / busy)
        driver |= {name: value * played for name, value in rollouts.items()}
        driver["transfer"] += waited - busy * played
    worker = {**rollouts, "waiting": wall - busy}
    learner = {"learning": seconds["update"], "waiting": wall - seconds["update"]}
    processes = {"driver": driver, "worker": worker, "learner": learner}
    return {
        process: {name: float(value) / wall for name, value in parts.items()}
        for process, parts in processes.items()
    }


def sums(metrics: pd.DataFrame) -> pd.Series[Any]:
    """Seconds of all updates of one stage, as `shares` takes them."""
    wide = metrics.pivot_table(
        index=["policy_version", "env_steps"], columns="name", values="value"
    ).reset_index("env_steps")
    wide = wide[wide["steps_per_s"].notna()]
    steps = wide["env_steps"].diff().fillna(wide["env_steps"])
    times = wide.filter(like="time/").fillna(0.0)
    times.columns = times.columns.str.removeprefix("time/").str.removesuffix("_s")
    return times.assign(wall=steps / wide["steps_per_s"]).sum()


def tables(folder: Path) -> Iterator[str]:
    """A table in Markdown for every stage that trained."""
    config = load_run_config(folder)
    metrics = load(folder, table="metrics")
    for name, stage in config.stages.items():
        here = metrics[metrics["stage"] == name]
        if not isinstance(stage, Pretrain) or here.empty:
            continue
        seconds = sums(here)
        shards = job_spec(config, name).rollout.shards
        parallel = max(1, min(shards, int(config.workers.num)))
        found = shares(seconds, parallel=parallel, overlapped=stage.max_policy_lag > 0)
        steps, updates = here["env_steps"].max(), here["policy_version"].max()
        yield (
            f"{name}: {updates} updates, {steps:,} steps in {seconds['wall']:.1f} s; "
            f"{config.workers.num} workers, {shards} shards\n\n{markdown(found)}"
        )


def markdown(found: Shares) -> str:
    """One column for each process."""
    lines = [["share of time", *found], ["---"] * (len(found) + 1)]
    lines += [
        [title, *(f"{parts[key]:.1%}" if key in parts else "" for parts in found.values())]
        for key, title in ROWS.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder, or its name or its start in runs/")
    for table in tables(find_run(parser.parse_args().run)):
        print(f"{table}\n")


if __name__ == "__main__":
    main()
