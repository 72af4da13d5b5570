"""What is read of RLlib: episodes from its environments, metrics from its learners."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ray.rllib.core import DEFAULT_MODULE_ID

from dmrl_ray.rllib.environments import Row
from dmrl_ray.types import Columns

NAMES = {
    "vf_loss": "value_loss",
    "mean_kl_loss": "approx_kl",
    "total_loss": "loss",
    "gradients_default_optimizer_global_norm": "grad_norm",
}
"""Metrics that have another name here ..."""

OWN_NAMES = ("policy_loss", "entropy")
"""... or the same."""


def take_episodes_of(group: Any) -> tuple[list[Row], int]:
    """Rows of the episodes that ended since the last call, and steps of all environments.

    Args:
        group: an ``EnvRunnerGroup``. Its environments count as stepping side by side.
    """
    taken = [part for parts in group.foreach_env_runner(_take_episodes) for part in parts]
    steps = sum(count for _, count in taken)
    rows = [{**row, "step": row["step"] * steps // n} for part, n in taken for row in part]
    return sorted(rows, key=lambda row: int(row["step"])), steps


def sample_once(runner: Any) -> None:
    """Let an ``EnvRunner`` sample, and forget what it saw."""
    if runner.env is not None:
        runner.sample()


def envs_of(rows: list[Row]) -> Columns:
    """Rows, column by column."""
    names = ("episode", "return", "length", "success", "step")
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    columns["task"] = np.empty(len(rows), object)
    columns["task"][:] = [row["task"] for row in rows]
    return columns


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    """What the learner reports, by our names where there is one."""
    found = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return {
        NAMES.get(name, name if name in OWN_NAMES else f"rllib/{name}"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float | np.number) and math.isfinite(value)
    }


def _take_episodes(runner: Any) -> list[tuple[list[Row], int]]:
    return [env.take_episodes() for env in _environments(runner)]


def _environments(runner: Any) -> list[Any]:
    """Those of an ``EnvRunner``; none in a process that only learns."""
    if runner.env is None:
        return []
    vectors = runner.env.unwrapped
    return [env.unwrapped for env in getattr(vectors, "envs", [vectors])]
