"""Compares another library with this one on the same tasks, network and settings.

    python -m benchmarks.against rllib                       # both tasks, three rounds
    python -m benchmarks.against sb3 --rows cartpole --rounds 5 --seconds 20

Peers are ``sb3`` (Stable-Baselines3, and sb3-contrib's recurrent PPO), ``rllib``, and ``jitted``,
a training loop compiled as a whole by JAX. None is installed by default: ``pip install -c
constraints.txt -e '.[peers]'``. All settings are those of the row's config. A round is one run of
each of our variants and one of the peer, and ratios are taken within rounds. Prints a JSON line for
each variant and a table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.against.match import fail_on_missing, match
from benchmarks.against.one import PEERS
from benchmarks.machine import machine
from benchmarks.throughput.__main__ import one as ours
from benchmarks.throughput.measures import Figures
from benchmarks.throughput.rows import ROWS, Row, Variant
from benchmarks.throughput.table import Figure, number, shown, summary
from dmrl_ray.config.loading import parse_config

TASKS = ("cartpole", "bandit_n10")
COSTS_US = (0, 100, 1000, 10_000)
"""Additional CPU microseconds of an environment step, for the ratio with expensive environments."""

COLUMNS = (
    "task",
    "ours",
    "peer",
    "steps/s, ours / peer",
    "CPU µs a step, ours",
    "peer's",
    "s to the target, ours",
    "peer's",
    "score, ours",
    "peer's",
)


def ratios(mine: Sequence[Figures], theirs: Sequence[Figures]) -> Figure:
    """Returns the ratios of steps per second over rounds."""
    return summary([{"x": a["sps"] / b["sps"]} for a, b in zip(mine, theirs, strict=True)])["x"]  # type: ignore[operator]


def with_costly_steps(mine_us: float, theirs_us: float) -> dict[int, float]:
    """Returns ratios of CPU time, peer over ours, by additional cost of an environment step."""
    return {cost: (theirs_us + cost) / (mine_us + cost) for cost in COSTS_US}


def score(row: str, returns: float | None) -> float | None:
    """Returns the score of a mean return: 0 is the random policy, 1 the best known reference."""
    matched = match(row, 0, 0)
    tasks = matched.family().sample(np.random.default_rng(0), 1, "train")
    reference = matched.family().reference(tasks[0])
    if reference is None or returns is None:
        return None
    low, high = float(reference.random.mean()), float(reference.oracle.mean())
    return (returns - low) / (high - low)


def line(
    row: str, peer: str, variant: str, mine: Sequence[Figures], theirs: Sequence[Figures]
) -> dict[str, object]:
    """Returns the figures of one of our variants and the peer."""
    both = {"ours": summary(mine), "theirs": summary(theirs)}
    cpu = [both[side]["cpu_us_per_step"]["median"] for side in both]
    return {
        "row": row,
        "title": ROWS[row].title,
        "peer": peer,
        "variant": variant,
        "runs": len(mine),
        "ratio": ratios(mine, theirs),
        "cpu_ratio_by_env_us": with_costly_steps(*cpu),  # type: ignore[arg-type]
        "score": {
            side: score(row, found["final_return"]["median"]) for side, found in both.items()
        },
        **both,
    }


def cells(line: Mapping[str, object]) -> list[str]:
    """Returns the cells of a line of the table."""
    runs: int = line["runs"]  # type: ignore[assignment]
    figures = [
        shown(line[side][name], runs)  # type: ignore[index]
        for name in ("cpu_us_per_step", "to_target_s")
        for side in ("ours", "theirs")
    ]
    scores: dict[str, float | None] = line["score"]  # type: ignore[assignment]
    last = ["-" if value is None else number(value) for value in scores.values()]
    titles = [str(line[name]) for name in ("title", "variant", "peer")]
    return [*titles, shown(line["ratio"], runs), *figures, *last]  # type: ignore[arg-type]


def comparable(row: Row, variant: Variant) -> bool:
    """Returns whether a variant has the same algorithm, network and number of environments."""
    configs = (parse_config(row.text, "row", list(s)) for s in ((), variant.settings))
    plain, changed = (
        (c.algorithm, c.network, c.rollout.shards * c.rollout.num_envs) for c in configs
    )
    return plain == changed


def rounds(
    peer: str, row: str, only: str, number_of: int, seconds: float, limit: float
) -> list[dict[str, object]]:
    """Runs both sides in alternation."""
    before = machine()
    variants = ROWS[row].variants.items()
    kept = [name for name, v in variants if only in name and comparable(ROWS[row], v)]
    mine: dict[str, list[Figures]] = {name: [] for name in kept}
    theirs: list[Figures] = []
    for _ in range(number_of):
        for variant, figures in mine.items():
            figures.append(ours(row, variant, {"seconds": seconds, "limit": limit}, []))
        theirs.append(run_peer(peer, row, seconds, limit))
    return [
        {**line(row, peer, variant, figures, theirs), "machine": before}
        for variant, figures in mine.items()
    ]


def run_peer(peer: str, row: str, seconds: float, limit: float) -> Figures:
    """Runs the peer once, in a separate process."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.against.one", peer, row, str(seconds), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: Figures = json.loads(answer.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--rows", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", default="", help="only variants whose names contain this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="maximum seconds until the target is reached"
    )
    options = parser.parse_args()
    fail_on_missing(importlib.import_module(f"benchmarks.against.{options.peer}").NEEDS)
    lines = []
    for row in options.rows:
        arguments = (options.only, options.rounds, options.seconds, options.limit)
        for found in rounds(options.peer, row, *arguments):
            lines.append(found)
            print(json.dumps(found), flush=True)
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells(found) for found in lines)]
    print(f"\n{machine()}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table))
    print("\nRatio of CPU time, peer over ours, with additional cost of an environment step:")
    for found in lines:
        by_cost: dict[int, float] = found["cpu_ratio_by_env_us"]  # type: ignore[assignment]
        text = ", ".join(f"+{cost} µs {ratio:.2f}" for cost, ratio in by_cost.items())
        print(f"  {found['row']}, {found['variant']}: {text}")


if __name__ == "__main__":
    main()
