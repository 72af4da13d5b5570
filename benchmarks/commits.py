"""Many commits of small tables: the files they leave, the time of `load`, and of a commit.

    python -m benchmarks.commits FOLDER [--commits 10000] [--record]

Each commit adds what an iteration of a small run does: rows of episodes, metrics, events and tasks,
with ``--record`` transitions as well, and a checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import verify
from dmrl_ray.store.writer import RunWriter

JOB = {"stage": "train", "job": "train"}
ZEROS = ("trial", "episode", "adaptation_step", "policy_version", "env_steps", "length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to make the run in")
    parser.add_argument("--commits", type=int, default=10_000)
    parser.add_argument("--record", action="store_true", help="transitions, too")
    arguments = parser.parse_args()
    seconds = []
    with RunWriter.create(arguments.folder, "seed: 0\n", {"seed": 0}) as writer:
        for number in range(arguments.commits):
            _add(writer, number, record=arguments.record)
            start = time.perf_counter()
            last = writer.save("last", {"w": np.zeros(1000, np.float32)})
            writer.commit({"step": number}, {"last": last})
            seconds.append(time.perf_counter() - start)
    files = [path for path in arguments.folder.rglob("*") if path.is_file()]
    records = sorted((arguments.folder / "commits").iterdir())
    print(f"{arguments.commits} commits, {len(files)} files, {_mb(files):.1f} MB")
    print(f"newest record: {records[-1].stat().st_size / 1e3:.1f} kB, of {len(records)}")
    median, p95, p99, most = np.quantile(seconds, [0.5, 0.95, 0.99, 1.0]) * 1e3
    print(f"commit: median {median:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, most {most:.0f} ms")
    tables = ["episodes", "metrics", "events", "tasks"]
    for table in tables + ["transitions"] * arguments.record:
        start = time.perf_counter()
        rows = load(arguments.folder, table)
        print(f"load {table}: {time.perf_counter() - start:.2f} s for {len(rows)} rows")
    start = time.perf_counter()
    RunWriter.open(arguments.folder).close()
    print(f"open: {time.perf_counter() - start:.2f} s; problems: {verify(arguments.folder)}")


def _mb(files: list[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e6


def _add(writer: RunWriter, number: int, *, record: bool) -> None:
    rows = 8
    zeros = dict.fromkeys(ZEROS, number)
    tasks = [f"{number:08x}{row:04x}" for row in range(rows)]
    family = {"family": "point_goal", "params": '{"goal": [0.5, 0.25]}', "split": "train"}
    writer.add("tasks", {"task_id": tasks, **family})
    same = {"algorithm": "ppo", "split": "train", "seed": 0, "greedy": False, **JOB}
    returns = np.random.default_rng(number).random(rows)
    writer.add("episodes", {**zeros, **same, "task_id": tasks, "return": returns})
    metrics = {"name": [f"metric_{n}" for n in range(12)], "value": np.arange(12.0)}
    writer.add("metrics", {**JOB, "policy_version": number, "env_steps": number, **metrics})
    writer.add("events", {**JOB, "event": "update", "detail": "{}"})
    if record:
        steps = 64
        vectors = np.random.default_rng(number).random((steps, 4), np.float32).tolist()
        writer.add(
            "transitions",
            {
                **dict.fromkeys(("trial", "environment", "episode", "policy_version"), number),
                **{"task_id": tasks[0], "split": "train", "adaptation_step": 0, **JOB},
                **{"terminated": False, "truncated": False, "log_prob": 0.0, "t": np.arange(steps)},
                **{"action": np.zeros(steps, np.int64), "reward": np.ones(steps)},
                "obs": pa.array(vectors, pa.list_(pa.float32())),
            },
        )


if __name__ == "__main__":
    main()
