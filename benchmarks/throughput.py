"""Steps per second of real training: rollouts, updates and writing results, end to end.

    python -m benchmarks.throughput --task cartpole --workers 2 --envs 128 --seconds 20

Prints one JSON line: ``sps`` environment steps per second, ``cpu_us_per_step`` CPU microseconds
per step over the whole process tree, ``cores`` of them busy on average, ``t_target`` seconds of
training until the mean of the newest training episodes reached the target return (null if it did
not), ``learner_wait`` share of time that the learner waited for rollouts. The first fifth of the
time is warm-up and counts for ``t_target`` only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from dmrl_ray import controller
from dmrl_ray.display import Display
from dmrl_ray.errors import Interrupted
from dmrl_ray.results import load
from dmrl_ray.yaml_config import parse_config

TASKS = {
    "cartpole": """
tasks: {type: cartpole}
network: {type: actor_critic, encoder: {type: mlp, sizes: [64, 64]}}
algorithm: {type: ppo, num_steps: 128, epochs: 4, minibatches: 4, lr: 1e-3, entropy_coef: 0.01}
""",
    "bandit": """
tasks: {type: bandit, arms: 5, pulls: 10}
network: {type: actor_critic, encoder: {type: lstm, size: 128}}
algorithm: {type: rl2, epochs: 4, minibatches: 4}
""",
}
TARGETS = {"cartpole": (475.0, 100), "bandit": (6.6, 2000)}  # return, over this many episodes


def cpu_seconds() -> float:
    """CPU time of this process and all that descend from it, Ray's daemons included."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It ended meanwhile.
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family = {os.getpid()}
    while True:
        grown = family | {pid for pid, parent in parents.items() if parent in family}
        if grown == family:
            return sum(used[pid] for pid in family)
        family = grown


class Probe(Display):
    """Notes time, steps and CPU while a run is going, and asks it to stop in the end."""

    def __init__(self, seconds: float) -> None:
        super().__init__(quiet=True)
        self.seconds = seconds
        self.began: float | None = None
        self.points: list[tuple[float, int, float]] = []

    def update(self, stage: str, steps: int, *arguments: object, **figures: object) -> None:
        """Called by the run after every iteration."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
        elapsed = now - self.began
        if not self.points and elapsed < self.seconds / 5:
            return
        over = elapsed >= self.seconds and bool(self.points)
        if over or not self.points:
            self.points.append((now, steps, cpu_seconds()))
        if over:  # Two updates at least, however slow they are.
            signal.raise_signal(signal.SIGINT)


def seconds_to_target(folder: Path, target: float, window: int) -> float | None:
    """Of training, until the mean return of the newest episodes reached the target."""
    episodes = load(folder, table="episodes").query("split == 'train'").sort_values("env_steps")
    mean = episodes["return"].rolling(window).mean().to_numpy()
    reached = np.flatnonzero(mean >= target)
    if not len(reached):
        return None
    metrics = load(folder, table="metrics")
    began = metrics["time"].min() - pd.Timedelta(seconds=_first_iteration_s(metrics))
    moment = episodes["time"].iloc[int(reached[0])]
    return float((moment - began).total_seconds())


def _first_iteration_s(metrics: pd.DataFrame) -> float:
    first = metrics[metrics["policy_version"] == metrics["policy_version"].min()]
    values = first.set_index("name")["value"]
    return float(first["env_steps"].iloc[0] / values["steps_per_s"])


def measure(
    task: str, workers: int, envs: int, seconds: float, settings: list[str]
) -> dict[str, object]:
    """Train for some seconds and return the figures."""
    shards = max(1, workers)
    text = (
        f"name: throughput\n{TASKS[task]}\n"
        f"rollout: {{shards: {shards}, num_envs: {envs // shards}}}\n"
        f"workers: {{num: {workers}}}\n"
        "stages: {train: {type: pretrain, env_steps: 100G, validate_every: 1000000}}\n"
    )
    config = parse_config(text, "throughput", settings)
    probe = Probe(seconds)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        with suppress(Interrupted):
            controller.run(config, folder, display=probe)
        metrics = load(folder, table="metrics")
        target = seconds_to_target(folder, *TARGETS[task])
    wide = metrics.pivot_table(index="policy_version", columns="name", values="value")
    steps_per_update = metrics["env_steps"].max() / metrics["policy_version"].max()
    wall = steps_per_update / wide["steps_per_s"]
    (start, steps_0, cpu_0), (stop, steps_1, cpu_1) = probe.points[0], probe.points[-1]
    steps = steps_1 - steps_0
    return {
        "task": task,
        "workers": workers,
        "envs": envs,
        "sps": round(steps / (stop - start)),
        "cpu_us_per_step": round(1e6 * (cpu_1 - cpu_0) / steps, 2),
        "cores": round((cpu_1 - cpu_0) / (stop - start), 2),
        "t_target": None if target is None else round(target, 1),
        "learner_wait": round(float(wide["time/learner_wait_s"].sum() / wall.sum()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--envs", type=int, default=128, help="columns over all workers")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("settings", nargs="*", help="further settings, such as learners.threads=3")
    options = parser.parse_intermixed_args()
    figures = measure(
        options.task, options.workers, options.envs, options.seconds, options.settings
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
