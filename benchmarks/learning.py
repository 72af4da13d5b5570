"""What a config learns, over several seeds, on held-out tasks.

    python -m benchmarks.learning configs/bandit_n10_rl2.yaml --seeds 0 1 2 --out results

Trains each seed into ``OUT/NAME-seedN`` (a folder that is there already is resumed, or taken as it
is when done) and prints one JSON line: for each evaluation stage the mean return of a trial over
its tasks and per shot, with 95 % intervals over all tasks of all seeds, each seed's own mean, and
for each training stage steps and seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from dmrl_ray.results import load
from dmrl_ray.stages import job_spec
from dmrl_ray.yaml_config import load_config


def train(config: str, seed: int, folder: Path, settings: Sequence[str]) -> None:
    """Run one seed in a process of its own, to the end."""
    command = [sys.executable, "-m", "dmrl_ray", "run", config, f"seed={seed}", *settings]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        subprocess.run(
            [*command, "--resume", "--out", str(folder)], stdout=log, stderr=log, check=True
        )


def summary(folders: Sequence[Path]) -> dict[str, object]:
    """The figures of some runs of one config."""
    config = load_config(folders[0] / "config.yaml")
    kinds = {name: stage.type for name, stage in config.stages.items()}
    episodes = pd.concat([load(folder) for folder in folders])
    events = pd.concat([load(folder, table="events") for folder in folders])
    figures: dict[str, object] = {}
    for name, kind in kinds.items():
        rows = episodes[episodes["stage"] == name]
        if kind == "evaluate":
            algorithm = job_spec(config, name).algorithm.settings
            figures[name] = evaluation(rows, getattr(algorithm, "episodes_per_task", 1))
        elif kind == "pretrain":
            ended = events[(events["stage"] == name) & (events["event"] == "job_finished")]
            details = [json.loads(detail) for detail in ended["detail"]]
            figures[name] = {
                "env_steps": int(np.mean([d["env_steps"] for d in details])),
                "seconds": [round(d["seconds"]) for d in details],
            }
    return figures


def evaluation(rows: pd.DataFrame, columns: int) -> dict[str, object]:
    """Mean return per trial and per shot; half-widths of 95 % intervals are 1.96 errors.

    Args:
        columns: environments that played one drawn task side by side.
    """
    keys = ["run_id", "task_id", "trial"]
    shots = rows.groupby([*keys, "shot"])["return"].mean()
    trials = shots.groupby(keys).sum()
    # Small families draw a task more than once; every draw counts.
    draws = rows.groupby(keys).size() / rows["shot"].nunique() / columns
    seeds = rows.groupby(["run_id", "shot"])["return"].mean().groupby("run_id").sum()
    error = np.sqrt(np.average((trials - seeds.mean()) ** 2, weights=draws) / draws.sum())
    by_shot = rows.groupby("shot")[["return", "score"]].mean().round(3)
    return {
        "trial_return": round(float(seeds.mean()), 3),
        "interval": round(1.96 * float(error), 3),
        "per_seed": [round(float(x), 3) for x in seeds],
        "per_shot": by_shot["return"].to_dict(),
        "score_per_shot": by_shot["score"].to_dict(),
        "tasks": round(float(draws.sum()) / rows["run_id"].nunique()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", help="settings to change, such as workers.num=0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--parallel", type=int, default=1, help="seeds trained side by side")
    options = parser.parse_intermixed_args()
    name = Path(options.config).stem
    folders = [options.out / f"{name}-seed{seed}" for seed in options.seeds]
    with ThreadPoolExecutor(options.parallel) as pool:
        jobs = zip(options.seeds, folders, strict=True)
        list(pool.map(lambda job: train(options.config, *job, options.settings), jobs))
    print(json.dumps({"config": name, "seeds": options.seeds} | summary(folders)))


if __name__ == "__main__":
    main()
