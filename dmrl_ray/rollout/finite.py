"""Non-finite numbers, and whether an environment or the policy is at fault."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dmrl_ray.backend import host
from dmrl_ray.errors import NumericalError
from dmrl_ray.rollout.episodes import Episodes
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import name_of
from dmrl_ray.types import Array, EnvironmentFault


class Observed(Protocol):
    """The numbers that environments gave in a rollout, with the names of `Rollout`."""

    obs: Array
    reward: Array
    final_step: Array
    final_env: Array
    final_obs: Array


def check_finite(
    family: TaskDistribution, rollout: Observed, episodes: Episodes, steps: int
) -> None:
    """Check that all observations and rewards of a rollout are finite.

    Args:
        steps: done in the collection before the rollout.

    Raises:
        EnvironmentFault: one is not; the message says where, and on which task.
    """
    found = _first_not_finite(rollout)
    if found is not None:
        name, t, env, value = found
        task = episodes.task_at(steps + t, env).to_json()
        detail = {"task_id": task["id"], "params": task["params"], "environment": env, "step": t}
        raise EnvironmentFault(
            f"{name_of(family)}: {name} of environment {env} at step {t} is {value}, on task "
            f"{task['id']} {task['params']}"[:1000]
            + "; environments must return finite numbers",
            detail,
        )


def diverged(update: int | None = None, adaptation_step: np.ndarray | int = 0) -> NumericalError:
    """The error of a policy whose actions are not finite, although all that it observed is.

    Args:
        update: number of the last update of the policy, if known.
        adaptation_step: of each environment, if known; the message reports the largest.
    """
    after = "" if update is None else f" after update {update}"
    sizes = "algorithm.lr"
    if most := int(np.max(adaptation_step)):
        after += f" and adaptation step {most}"
        sizes += " or the step size of adaptation"
    return NumericalError(
        f"the policy diverged{after}: its actions are not finite numbers, though the observations "
        f"and rewards are; lower {sizes}, or check the size of the rewards"
    )


def _first_not_finite(rollout: Observed) -> tuple[str, int, int, float] | None:
    """Name, step, environment and value of an observation or reward that is not finite, if any."""
    ends = np.stack([host(rollout.final_step), host(rollout.final_env)], 1)
    for name in ("obs", "reward", "final_obs"):
        array = host(getattr(rollout, name))
        if np.isfinite(array.sum()):
            continue
        where = np.argwhere(~np.isfinite(array))
        if len(where):
            t, env = ends[where[0][0]] if name == "final_obs" else where[0][:2]
            return name, int(t), int(env), float(array[tuple(where[0])])
    return None
