"""Measures one run of one row."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from benchmarks.machine import command_of, family, resident_mb
from benchmarks.throughput.probe import Probe, speed
from benchmarks.throughput.rows import Row, Variant
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.errors import Interrupted
from dmrl_ray.results.reading import load
from dmrl_ray.store.writer import RunWriter

Figures: TypeAlias = dict[str, float | None]
"""Figures by name; None if there is none, such as the time to a target that was not reached."""

COMMAND = ["-m", "dmrl_ray"]
TIMED_COMMAND = [
    "-c",
    """
import os, runpy, sys, time
import ray
start_ray = ray.init
def init(*arguments, **options):
    start = time.monotonic()
    answer = start_ray(*arguments, **options)
    with open(os.environ["RAY_INIT_SECONDS"], "w") as file:
        file.write(str(time.monotonic() - start))
    return answer
ray.init = init
runpy.run_module("dmrl_ray", run_name="__main__", alter_sys=True)
""",
]
"""The same command, with the duration of `ray.init` written to a file."""


def training(row: Row, variant: Variant) -> Figures:
    """Measures speed, time to the target, and the learner's waiting time."""
    probe = Probe(row.seconds, row.target and row.target[0], row.limit)
    with trained(row, variant, probe) as folder:
        figures: Figures = {**speed(probe.points[0], probe.points[-1])}
        metrics = load(folder, table="metrics")
        if row.target is not None:
            newest = training_returns(folder, row.target[1])
            reached = seconds_to_target(newest, metrics, row.target[0])
            compiling = metrics.loc[metrics["name"] == "time/compile_s", "value"]
            compile_s = float(compiling.sum())
            if len(compiling):
                figures["compile_s"] = compile_s
            figures["to_target_s"] = None if reached is None else reached - compile_s
            final = newest["newest"].iloc[-1]
            figures["final_return"] = None if pd.isna(final) else float(final)
    wide = metrics.pivot_table(index="policy_version", columns="name", values="value")
    wall = steps_per_update(metrics) / wide["steps_per_s"]
    figures["learner_waits"] = float(wide["time/learner_wait_s"].sum() / wall.sum())
    return figures


def expensive(row: Row, variant: Variant) -> Figures:
    """Measures training, and the fraction of the rate if workers only stepped environments."""
    config = parse_config(row.text, "row", list(variant.settings))
    step_s = config.tasks.settings.step_ms / 1000
    figures = training(row, variant)
    assert figures["sps"] is not None
    return figures | {"of_ideal": figures["sps"] * step_s / config.workers.num}


def speed_alone(row: Row, variant: Variant) -> Figures:
    """Measures the speed of a run that may have no tables."""
    probe = Probe(row.seconds)
    with trained(row, variant, probe):
        return {**speed(probe.points[0], probe.points[-1])}


def worker_memory(row: Row, variant: Variant) -> Figures:
    """Measures the memory of the largest rollout worker at the end of a run on Ray."""
    found: list[float] = []

    class MemoryProbe(Probe):
        def last(self) -> None:
            found.extend(
                resident_mb(pid) for pid in family() if "ray::WorkerActor" in command_of(pid)
            )

    with trained(row, variant, MemoryProbe(row.seconds)):
        return {"resident_mb": max(found)}


def driver_memory(row: Row, variant: Variant) -> Figures:
    """Measures the memory of the driver after some updates, and after many."""
    probe = Probe(0.0, memory_at=row.memory_at)
    with trained(row, variant, probe):
        figures: Figures = {f"mb_at_{n}": mb for n, mb in probe.memory_mb.items()}
    first, *_, last = probe.memory_mb.values()
    return figures | {"growth_mb": last - first}


def start(row: Row, variant: Variant) -> Figures:
    """Measures the seconds from the start of the command to the first update."""
    with tempfile.TemporaryDirectory() as root:
        folder, config, ray_init = (Path(root) / name for name in ("run", "run.yaml", "ray"))
        config.write_text(row.text)
        on_ray = "workers.num=0" not in variant.settings
        command = [*(TIMED_COMMAND if on_ray else COMMAND), "run", str(config), *variant.settings]
        started = time.time()
        subprocess.run(
            [sys.executable, *command, "--out", str(folder)],
            env={**os.environ, "RAY_INIT_SECONDS": str(ray_init)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        first = load(folder, table="metrics")["time"].min().timestamp()
        figures: Figures = {"first_update_s": first - started}
        if on_ray:
            ray_s = float(ray_init.read_text())
            figures |= {"ray_init_s": ray_s, "without_ray_init_s": first - started - ray_s}
        return figures


@contextmanager
def trained(row: Row, variant: Variant, probe: Probe) -> Iterator[Path]:
    """Runs a variant until the probe stops it, and yields the run folder."""
    config = parse_config(row.text, "row", list(variant.settings))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        with suppress(Interrupted), nullified(RunWriter, _ROWS if not variant.write_rows else ()):
            controller.run(config, folder, display=probe)
        yield folder


_ROWS = ("add_episodes", "add_metrics", "add_steps", "add_tasks")


@contextmanager
def nullified(kind: type, methods: tuple[str, ...]) -> Iterator[None]:
    """Replaces methods of a class by no-ops within the context."""
    before = {name: getattr(kind, name) for name in methods}
    for name in methods:
        setattr(kind, name, lambda *arguments: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(kind, name, method)


def training_returns(folder: Path, window: int) -> pd.DataFrame:
    """Returns training episodes in order, with a moving average of the return as ``newest``."""
    episodes = load(folder, table="episodes").query("split == 'train'").sort_values("env_steps")
    return episodes.assign(newest=episodes["return"].rolling(window).mean())


def seconds_to_target(episodes: pd.DataFrame, metrics: pd.DataFrame, target: float) -> float | None:
    """Returns seconds of training until the target was reached; None if it was not."""
    reached = np.flatnonzero(episodes["newest"].to_numpy() >= target)
    if not len(reached):
        return None
    rate = metrics[metrics["name"] == "steps_per_s"].iloc[0]
    began = rate["time"] - pd.Timedelta(seconds=rate["env_steps"] / rate["value"])
    return float((episodes["time"].iloc[int(reached[0])] - began).total_seconds())


def steps_per_update(metrics: pd.DataFrame) -> float:
    """Returns environment steps per update."""
    return float(metrics["env_steps"].max() / metrics["policy_version"].max())


MEASURES = {
    f.__name__: f for f in (training, speed_alone, expensive, worker_memory, driver_memory, start)
}
