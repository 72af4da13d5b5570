"""Checks of an external environment before a run starts."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from dmrl_ray.tasks.faults import RAISED, pass_signals
from dmrl_ray.types import EnvironmentFault

from .external_env import Apply, ExternalEnv, Values, close, find_attribute, find_set_task

CHECKED_STEPS = 10
"""The number of random steps taken before a run starts."""


CHECKED_ENVS = 3
"""The number of environments of which one must take these steps without a fault."""


def first_make(make: Callable[[], gym.Env[Any, Any]], env_id: str) -> gym.Env[Any, Any]:
    """Builds an environment for the first time.

    Raises:
        ValueError: it cannot be built.
    """
    try:
        return make()
    except gym.error.DependencyNotInstalled as error:
        raise ValueError(f"tasks.id: {env_id} needs an optional package: {error}") from None
    except ImportError as error:
        raise ValueError(
            f"tasks.id: {env_id} needs a module that cannot be imported ({error}); install it"
        ) from None
    except gym.error.Error as error:
        raise ValueError(f"tasks.id: {error}") from None
    except RAISED as error:
        pass_signals(error)
        raise ValueError(
            f"tasks.id: {env_id} cannot be built ({type(error).__name__}: {error}); "
            "check tasks.kwargs and what is varied"
        ) from None


def find_max_episode_steps(env: gym.Env[Any, Any], env_id: str, given: int | None) -> int:
    """Returns the time limit of the config, else the registered one.

    Raises:
        ValueError: there is neither.
    """
    spec = env.unwrapped.spec
    registered = gym.registry[spec.id].max_episode_steps if spec else None
    limit = given or registered
    if limit is None:
        raise ValueError(
            f"tasks.max_episode_steps: {env_id} is registered without a limit; give one"
        )
    return limit


def check_vary(env: gym.Env[Any, Any], env_id: str, apply: Apply, values: Values) -> None:
    """Checks that the environment has the attributes or method by which tasks vary.

    Raises:
        ValueError: it has not.
    """
    if apply == "set_task" and values:
        try:
            find_set_task(env)
        except AttributeError:
            raise ValueError(
                f"tasks.apply: {env_id} has no method set_task; use attributes or kwargs"
            ) from None
    if apply != "attributes":
        return
    for name in values:
        try:
            find_attribute(env, name)
        except AttributeError:
            near = get_close_matches(name, [a for a in dir(env.unwrapped) if a[0] != "_"], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"tasks.vary.{name}: {env_id} has no such attribute{hint}") from None


def check_steps(
    make: Callable[[int], ExternalEnv], env_id: str, apply: Apply, values: Values
) -> None:
    """Checks what the environment returns at a reset and a few random steps.

    One that fails now and then is found while it is played, where a run may go on after a fault.

    Raises:
        ValueError: a returned value violates the contract, in several environments.
    """
    for left in reversed(range(CHECKED_ENVS)):
        external = make(0)
        try:
            _play(external, env_id, apply, values)
        except EnvironmentFault as fault:
            if not left:
                raise ValueError(f"tasks.id: {fault}; repair the environment or wrap it") from None
        else:
            close(external.env)
            return


def _play(external: ExternalEnv, env_id: str, apply: Apply, values: Values) -> None:
    env = external.env
    rng = np.random.default_rng(0)
    _check_inside(env, env_id, external.reset(values, 0, changed=True), "reset")
    if apply == "attributes":
        _check_kept(env, env_id, values)
    for t in range(CHECKED_STEPS):
        action = _random_action(external, rng)
        obs, _, terminated, truncated, _ = external.step(action)
        _check_inside(external.env, env_id, obs, f"step {t + 1}")
        if terminated or truncated:
            external.reset(values, t + 1, changed=False)


def _random_action(external: ExternalEnv, rng: np.random.Generator) -> Any:
    space = external.env.action_space
    if isinstance(space, Box):
        return rng.uniform(-1.0, 1.0, space.shape).astype(np.float32)
    assert isinstance(space, gym.spaces.Discrete)
    return int(rng.integers(int(space.n)))


def _check_inside(env: gym.Env[Any, Any], env_id: str, obs: np.ndarray, when: str) -> None:
    space = env.observation_space
    if not isinstance(space, Box):
        return  # `ExternalEnv` has checked all others.
    low, high = space.low.astype(obs.dtype), space.high.astype(obs.dtype)
    outside = np.argwhere((obs < low) | (obs > high))
    if len(outside):
        index = tuple(outside[0].tolist())
        raise ValueError(
            f"tasks.id: {env_id}: at {when} the observation is {obs[index]} at {list(index)}, "
            f"outside its space [{low[index]}, {high[index]}]; widen the space"
        )


def _check_kept(env: gym.Env[Any, Any], env_id: str, values: Values) -> None:
    for name, value in values.items():
        owner, attribute = find_attribute(env, name)
        if not np.array_equal(getattr(owner, attribute), value):
            raise ValueError(
                f"tasks.vary.{name}: {env_id} overwrites this attribute at reset; "
                "use apply: kwargs or set_task"
            )
