"""Reads episodes from RLlib's environments, and metrics from its learners."""

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
"""Metrics of RLlib, with their names here."""

SAME_NAMES = ("policy_loss", "entropy")
"""Metrics with the same name here; others get the prefix ``rllib/``."""


def take_episodes_of(group: Any) -> tuple[list[Row], int]:
    """Returns the episodes that ended since the last call, and the steps of all environments.

    Args:
        group: an ``EnvRunnerGroup``, whose environments count as stepping in parallel.
    """
    taken = [part for parts in group.foreach_env_runner(_take_episodes) for part in parts]
    steps = sum(count for _, count in taken)
    rows = [{**row, "step": row["step"] * steps // n} for part, n in taken for row in part]
    return sorted(rows, key=lambda row: int(row["step"])), steps


def sample_once(runner: Any) -> None:
    """Lets an ``EnvRunner`` sample, and discards the result."""
    if runner.env is not None:
        runner.sample()


def columns_of(rows: list[Row]) -> Columns:
    """Returns rows as columns."""
    names = ("episode", "return", "length", "success", "step")
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    columns["task"] = np.empty(len(rows), object)
    columns["task"][:] = [row["task"] for row in rows]
    return columns


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of the learner, with the names used here."""
    found = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return {
        NAMES.get(name, name if name in SAME_NAMES else f"rllib/{name}"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float | np.number) and math.isfinite(value)
    }


def _take_episodes(runner: Any) -> list[tuple[list[Row], int]]:
    return [env.take_episodes() for env in _environments(runner)]


def _environments(runner: Any) -> list[Any]:
    """Returns the environments of an ``EnvRunner``; none in a process that only learns."""
    if runner.env is None:
        return []
    vectors = runner.env.unwrapped
    return [env.unwrapped for env in getattr(vectors, "envs", [vectors])]
