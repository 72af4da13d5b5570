"""Errors of task families: exceptions and invalid return values, reported in one sentence.

A family is external code and may raise anything. Its author needs to know what happened where in
that code, without the stack frames of this package.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeAlias

import gymnasium as gym
import numpy as np

from dmrl_ray.errors import ConfigError
from dmrl_ray.tasks.activity import ACTIVITIES, CODES, mine
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, EnvironmentFault, Split, Task

Family: TypeAlias = TaskDistribution | type[TaskDistribution]

RAISED = (Exception, SystemExit, KeyboardInterrupt)
"""Exceptions that a family may raise; `fault` and `pass_signals` tell from what a signal raised."""

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sys.prefix, sys.base_prefix})
_CALLERS = {__file__, *(str(Path(_PACKAGE, f)) for f in ("rollout/sampler.py", "jobs/spec.py"))}
_leave, _pid = os._exit, 0


def fault(family: Family, method: str, error: BaseException) -> EnvironmentFault:
    """Returns the `EnvironmentFault` that describes an error of a family's method.

    Raises:
        BaseException: the error itself, if a signal raised it and not the family.
    """
    pass_signals(error)
    found = f"{type(error).__name__}: {error}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    if not frames:  # This package failed to use the return value.
        return EnvironmentFault(
            f"{name_of(family)}: the return value of {method} is invalid ({found})"
        )
    authored = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]
    frame = (authored or frames)[-1]
    return EnvironmentFault(
        f"{name_of(family)}: {method} raised {found} ({frame.filename}, line {frame.lineno})"
    )


def answer_of(family: TaskDistribution, method: Callable[..., Any], *arguments: object) -> Any:
    """Calls a method of the family or of its environments.

    Raises:
        EnvironmentFault: the method raised.
    """
    activity = mine()
    before = activity.what
    activity.begin(CODES.get(getattr(method, "__name__", ""), len(ACTIVITIES) - 1))
    try:
        return method(*arguments)
    except EnvironmentFault:
        raise
    except RAISED as error:
        raise fault(family, method.__name__, error) from error
    finally:
        activity.begin(before)


def pass_signals(error: BaseException) -> None:
    """Raises the error again if a signal's handler raised it in the middle of a family's code."""
    raised = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    interrupted = (
        isinstance(error, KeyboardInterrupt)
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    )
    if interrupted or not _handlers().isdisjoint(raised):
        raise error


def _handlers() -> set[CodeType]:
    """The code of this process's handlers of signals."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    return {code for code in codes if code is not None}


def contain_exit() -> None:
    """Has `os._exit` raise SystemExit where an environment calls it in this process.

    A run would end without a word, and with the exit code of the environment's choice. All other
    callers, and processes that an environment forks, end as before.
    """
    global _pid
    _pid, os._exit = os.getpid(), _exit


def _exit(status: int) -> NoReturn:
    if os.getpid() == _pid and _in_family(sys._getframe(1)):
        raise SystemExit(f"os._exit({status})")
    _leave(status)


def _in_family(caller: FrameType) -> bool:
    """Whether a frame is of code that this package called as a family's, and of no handler."""
    frame, handlers = caller, _handlers()
    while not _is_ours(frame.f_code.co_filename):
        if frame.f_code in handlers or frame.f_back is None:
            return False
        frame = frame.f_back
    return frame is not caller and frame.f_code.co_filename in _CALLERS


def name_of(family: Family) -> str:
    """Returns the family's name for messages."""
    return f"task family {getattr(family, 'family', 'without a name')!r}"


def sample(family: TaskDistribution, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
    """Samples n tasks of a split.

    Raises:
        EnvironmentFault: `sample` raised, or returned anything but a list of n tasks.
    """
    tasks = answer_of(family, family.sample, rng, n, split)
    valid = isinstance(tasks, list) and all(isinstance(task, Task) for task in tasks)
    if not valid or len(tasks) != n:
        raise EnvironmentFault(
            f"{name_of(family)}: sample must return a list of the {n} requested tasks of split "
            f"{split!r}; make them with dmrl_ray.tasks.distribution.make_tasks"
        )
    checked: list[Task] = tasks
    return checked


def reference(family: TaskDistribution, task: Task) -> Reference | None:
    """Returns the reference returns of a task, or None where the family does not know them.

    Raises:
        EnvironmentFault: `reference` raised.
    """
    returns: Reference | None = answer_of(family, family.reference, task)
    return returns


def check_spaces(family: TaskDistribution) -> None:
    """Checks that policies support the family's spaces.

    Raises:
        ConfigError: an attribute is missing, or a space is not supported.
    """
    for name in ("family", "observation_space", "action_space", "max_episode_steps"):
        if not hasattr(family, name):
            raise ConfigError(f"tasks: {type(family).__name__} lacks the attribute {name!r}")
    obs_space, action_space = family.observation_space, family.action_space
    if not isinstance(obs_space, gym.spaces.Box) or obs_space.dtype not in (np.float32, np.uint8):
        raise ConfigError(
            f"tasks: {name_of(family)}: observations are {obs_space}; a Box of float32, or of "
            "uint8 for images, is needed"
        )
    valid = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    if isinstance(action_space, gym.spaces.Box):
        in_range = (action_space.low == -1).all() and (action_space.high == 1).all()
        valid = len(action_space.shape) == 1 and bool(in_range)
    if not valid:
        raise ConfigError(
            f"tasks: {name_of(family)}: actions are {action_space}; a Discrete from 0, or a Box "
            "from -1 to 1 with one axis, is needed"
        )


def first_obs(family: TaskDistribution, env: TaskVectorEnv) -> Array:
    """Resets every environment and returns the observations.

    Raises:
        EnvironmentFault: `reset` raised, or the observations are not in the family's space.
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
            f"{obs.dtype}; for {env.num_envs} environments the space requires {shape} and "
            f"{space.dtype}"
        )
    return obs


def _is_ours(filename: str) -> bool:
    inside = filename.startswith(_PACKAGE)
    return inside and not filename.startswith(str(Path(_PACKAGE, "envs")))
