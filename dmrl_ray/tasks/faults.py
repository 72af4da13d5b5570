"""Faults of a task family: what its author's code raised or answered, told in one sentence.

A family is external code and may raise anything; whoever wrote it needs to know what and where, and
not the way that led there through this package.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np

from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.types import Array, EnvironmentFault, Reference, Split, Task

Family: TypeAlias = TaskDistribution | type[TaskDistribution]

_PACKAGE = str(Path(__file__).parents[1])
_OTHERS = tuple({sys.prefix, sys.base_prefix})


def fault(family: Family, what: str, error: Exception) -> EnvironmentFault:
    """The fault that `error` is, if it came out of the family's method `what`."""
    found = f"{type(error).__name__}: {error}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    if not frames:  # It was this package that could not use the answer.
        return EnvironmentFault(f"{name_of(family)}: the answer of {what} cannot be used ({found})")
    written = [f for f in frames if not f.filename.startswith((*_OTHERS, "<"))]
    place = (written or frames)[-1]
    return EnvironmentFault(
        f"{name_of(family)}: {what} raised {found} ({place.filename}, line {place.lineno})"
    )


def answer_of(family: TaskDistribution, method: Callable[..., Any], *arguments: object) -> Any:
    """Call a method of the family, or of its environment.

    Raises:
        EnvironmentFault: it raised.
    """
    try:
        return method(*arguments)
    except EnvironmentFault:
        raise
    except Exception as error:  # A family may raise anything.
        raise fault(family, method.__name__, error) from error


def name_of(family: Family) -> str:
    """How messages name a family."""
    return f"task family {getattr(family, 'family', 'without a name')!r}"


def sample(family: TaskDistribution, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
    """The family's tasks, as many as were asked for.

    Raises:
        EnvironmentFault: it raised, or answered something else.
    """
    tasks = answer_of(family, family.sample, rng, n, split)
    known = isinstance(tasks, list) and all(isinstance(task, Task) for task in tasks)
    if not known or len(tasks) != n:
        raise EnvironmentFault(
            f"{name_of(family)}: sample must return {n} tasks of split {split!r}, as it was asked "
            "for; make them with dmrl_ray.tasks.distribution.make_tasks"
        )
    checked: list[Task] = tasks
    return checked


def reference(family: TaskDistribution, task: Task) -> Reference | None:
    """Both ends of a task's score, if the family knows them.

    Raises:
        EnvironmentFault: it raised.
    """
    ends: Reference | None = answer_of(family, family.reference, task)
    return ends


def check_spaces(family: TaskDistribution) -> None:
    """See that policies can be built for the family.

    Raises:
        ValueError: an attribute is missing, or a space is one that no policy knows.
    """
    for name in ("family", "observation_space", "action_space", "max_episode_steps"):
        if not hasattr(family, name):
            raise ValueError(f"tasks: {type(family).__name__} lacks the attribute {name!r}")
    seen, acts = family.observation_space, family.action_space
    if not isinstance(seen, gym.spaces.Box) or seen.dtype not in (np.float32, np.uint8):
        raise ValueError(
            f"tasks: {name_of(family)}: observations are {seen}; a Box of float32, or of uint8 for "
            "images, is needed"
        )
    boxed = isinstance(acts, gym.spaces.Box) and len(acts.shape) == 1
    if isinstance(acts, gym.spaces.Box):
        boxed = boxed and bool((acts.low == -1).all() and (acts.high == 1).all())
    if not boxed and not (isinstance(acts, gym.spaces.Discrete) and acts.start == 0):
        raise ValueError(
            f"tasks: {name_of(family)}: actions are {acts}; a Discrete from 0, or a Box from -1 "
            "to 1 with one axis, is needed"
        )


def first_obs(family: TaskDistribution, env: TaskVectorEnv) -> Array:
    """Reset every column; the observations, if they are what the family's space says.

    Raises:
        EnvironmentFault: it raised, or they are not.
    """
    answer = answer_of(family, env.reset)
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise EnvironmentFault(f"{name_of(family)}: reset must return (observations, infos)")
    obs, space = answer[0], family.observation_space
    obs = np.asarray(obs) if env.xp is np else obs
    shape = (env.num_envs, *(space.shape or ()))
    if obs.shape != shape or str(obs.dtype).removeprefix("torch.") != str(space.dtype):
        raise EnvironmentFault(
            f"{name_of(family)}: reset returned observations of shape {obs.shape} and type "
            f"{obs.dtype}; for {env.num_envs} columns the space asks for {shape} and {space.dtype}"
        )
    return obs


def _is_ours(filename: str) -> bool:
    inside = filename.startswith(_PACKAGE)
    return inside and not filename.startswith(str(Path(_PACKAGE, "envs")))
