"""Breakdown of the training time of a run, from its metrics (see `dmrl_ray.control.train_loop`).

    python -m benchmarks.profile runs/NAME

For every training stage, fractions of the time of the driver, a rollout worker and the learner;
each column adds up to 100 %. The driver's waiting time for rollouts is divided like the time of a
worker; the remainder is transfer to and from workers, and shards that took longer than others. With
`max_policy_lag`, rollouts run during updates, and the driver's time is waiting. In one process,
driver, worker and learner alternate.
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
from dmrl_ray.store.commit_records import load_run_config

Shares: TypeAlias = dict[str, dict[str, float]]
"""Fractions of time, by process, then by activity."""

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
    """Returns the fractions of time of each process.

    Args:
        seconds: sums over all updates, named as the metrics without ``time/`` and ``_s``; ``wall``
            is the total time.
        parallel: number of shards that are collected in parallel.
        overlapped: whether rollouts run during updates.
    """
    wall = float(seconds["wall"])
    rollouts = {
        "env": seconds["env"] / parallel,
        "inference": seconds["inference"] / parallel,
        "rest": (seconds["shards"] - seconds["env"] - seconds["inference"]) / parallel,
    }
    busy = sum(rollouts.values())
    validated = seconds.get("validate", 0.0)  # There may have been no validation.
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
        fraction = min(1.0, waited / busy)
        driver |= {name: value * fraction for name, value in rollouts.items()}
        driver["transfer"] += waited - busy * fraction
    worker = {**rollouts, "waiting": wall - busy}
    learner = {"learning": seconds["update"], "waiting": wall - seconds["update"]}
    processes = {"driver": driver, "worker": worker, "learner": learner}
    return {
        process: {name: float(value) / wall for name, value in parts.items()}
        for process, parts in processes.items()
    }


def sums(metrics: pd.DataFrame) -> pd.Series[Any]:
    """Returns seconds summed over all updates of one stage, for `shares`."""
    wide = metrics.pivot_table(
        index=["policy_version", "env_steps"], columns="name", values="value"
    ).reset_index("env_steps")
    wide = wide[wide["steps_per_s"].notna()]
    steps = wide["env_steps"].diff().fillna(wide["env_steps"])
    times = wide.filter(like="time/").fillna(0.0)
    times.columns = times.columns.str.removeprefix("time/").str.removesuffix("_s")
    return times.assign(wall=steps / wide["steps_per_s"]).sum()


def tables(folder: Path) -> Iterator[str]:
    """Yields a Markdown table for every training stage."""
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
    """Returns a Markdown table with one column per process."""
    lines = [["share of time", *found], ["---"] * (len(found) + 1)]
    lines += [
        [title, *(f"{parts[key]:.1%}" if key in parts else "" for parts in found.values())]
        for key, title in ROWS.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder, or the name of a run in runs/ or its beginning")
    for table in tables(find_run(parser.parse_args().run)):
        print(f"{table}\n")


if __name__ == "__main__":
    main()
