"""A gymnasium environment whose return values are checked: finite numbers in the declared spaces.

An error names the environment, the episode and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from hashlib import blake2b
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete

from dmrl_ray.tasks.spaces import Packed
from dmrl_ray.types import EnvironmentFault

from .gym_spaces import action_map, contents, leaves, observation_space

Apply = Literal["attributes", "kwargs", "set_task"]
Values = Mapping[str, bool | int | float]

LARGEST = float(np.finfo(np.float32).max)


class EnvNotDeterministic(EnvironmentFault):
    """An environment is not deterministic given a seed: its open episode cannot be restored."""


class ExternalEnv:
    """A gymnasium environment on one task, with the seed and actions that replay its episode."""

    def __init__(
        self,
        make: Callable[..., gym.Env[Any, Any]],
        apply: Apply,
        max_episode_steps: int,
        index: int,
    ):
        self.env = make()
        self.max_episode_steps = max_episode_steps
        self.index = index
        self.seed = -1  # no episode yet
        self.actions: list[Any] = []
        self._make = make
        self._apply = apply
        self._space = observation_space(self.env.observation_space)
        self._action = action_map(self.env.action_space)

    def reset(self, values: Values, seed: int, *, changed: bool) -> np.ndarray:
        """Sets the task, if it has changed, and resets with the seed; returns the observation."""
        self.seed, self.actions = seed, []
        try:
            if changed:
                self.set_task(values)
            returned = self.env.reset(seed=seed)
        except EnvironmentFault:  # it took longer than it may
            raise
        except Exception as error:  # an external environment may raise anything
            self._fail("reset", f"raised {type(error).__name__}: {error}", error)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            self._fail("reset", "did not return (observation, info)")
        return self._observation(returned[0])

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Mapping[str, Any]]:
        """Steps the environment; truncates the episode after `max_episode_steps`."""
        self.actions.append(action)
        try:
            returned = self.env.step(self._action(action))
        except EnvironmentFault:  # it took longer than it may
            raise
        except Exception as error:  # an external environment may raise anything
            self._fail("step", f"raised {type(error).__name__}: {error}", error)
        if not (isinstance(returned, tuple) and len(returned) == 5):
            self._fail("step", "did not return (observation, reward, terminated, truncated, info)")
        raw, reward, terminated, truncated, info = returned
        for field, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                self._fail(field, f"is {flag!r}, not a bool")
        time_limit = len(self.actions) >= self.max_episode_steps
        obs = self._observation(raw)
        return obs, self._reward(reward), bool(terminated), bool(truncated or time_limit), info

    def replay(self, values: Values, seed: int, actions: np.ndarray, digest: int) -> np.ndarray:
        """Replays an episode and returns its last observation, which must have this digest.

        Raises:
            EnvNotDeterministic: the observation is another one.
        """
        obs = self.reset(values, seed, changed=True)
        for action in actions:
            obs = self.step(action)[0]
        if obs_digest(obs) != digest:
            raise EnvNotDeterministic(
                f"{self._name()}: environment {self.index}: replaying the {len(actions)} actions "
                f"since the reset with seed {seed} led to another observation; "
                "all randomness must come from self.np_random for a run to be resumed"
            )
        return obs

    def set_task(self, values: Values) -> None:
        """Applies a task's parameters to the environment."""
        if self._apply == "kwargs":
            close(self.env)
            self.env = self._make(**values)
        elif self._apply == "set_task":
            find_set_task(self.env)(dict(values))
        else:
            for name, value in values.items():
                owner, attribute = find_attribute(self.env, name)
                setattr(owner, attribute, value)

    def _observation(self, raw: Any) -> np.ndarray:
        space = self.env.observation_space
        if not isinstance(self._space, Packed):
            array = self._checked("observation", space, self._space, raw)
            if isinstance(space, Discrete):
                return (np.arange(int(space.n)) == int(array) - int(space.start)).astype(np.float32)
            return array
        try:
            values = list(contents(space, raw))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            self._fail("observation", f"does not match {space} ({found})", error)
        arrays = {}
        for (name, part), value in zip(leaves(space), values, strict=True):
            packed = self._space.parts[name]
            arrays[name] = self._checked(f"observation[{name!r}]", part, packed, value)[None]
        return self._space.pack(arrays)[0]

    def _checked(
        self, field: str, space: gym.Space[Any], obs_space: gym.Space[Any], raw: Any
    ) -> np.ndarray:
        """Converts a value of the environment's space to an array of the policy's `obs_space`."""
        array = np.asarray(raw)
        if isinstance(space, Discrete | MultiDiscrete):
            if not (array.shape == space.shape and array.dtype.kind in "iu" and array in space):
                self._fail(field, f"is {raw!r}, not in {space}")
            return array
        if array.dtype.kind not in "fiub":
            self._fail(field, f"is {raw!r}, not an array of numbers")
        if array.shape != obs_space.shape:
            self._fail(field, f"has shape {array.shape}, its space has {obs_space.shape}")
        if obs_space.dtype == np.uint8 and array.dtype != np.uint8:
            self._fail(field, f"is {array.dtype}, its space is uint8")
        with np.errstate(over="ignore"):  # An overflow is infinite, which the next check finds.
            array = array.astype(obs_space.dtype)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            index = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
            self._fail(field, f"is {np.asarray(raw)[index]} at {list(index)}")
        return array

    def _reward(self, reward: Any) -> float:
        value = np.asarray(reward)
        if value.size != 1 or value.dtype.kind not in "fiub":
            self._fail("reward", f"is {reward!r}, not a number")
        number = float(value.item())
        if not abs(number) <= LARGEST:
            self._fail("reward", f"is {number}, not a finite number in float32")
        return number

    def _fail(self, field: str, found: str, cause: Exception | None = None) -> NoReturn:
        raise EnvironmentFault(
            f"{self._name()}: environment {self.index}, episode seed {self.seed}, "
            f"step {len(self.actions)}: {field} {found}"
        ) from cause

    def _name(self) -> str:
        spec = self.env.unwrapped.spec
        return spec.id if spec else type(self.env.unwrapped).__name__


def find_attribute(env: gym.Env[Any, Any], name: str) -> tuple[Any, str]:
    """Returns the owner and name of a dotted attribute of the unwrapped environment.

    Raises:
        AttributeError: there is none.
    """
    *owners, attribute = name.split(".")
    owner = reduce(getattr, owners, env.unwrapped)
    getattr(owner, attribute)
    return owner, attribute


def find_set_task(env: gym.Env[Any, Any]) -> Callable[[dict[str, bool | int | float]], None]:
    """Returns the outermost `set_task` of an environment and its wrappers.

    Raises:
        AttributeError: there is none.
    """
    layer = env
    while isinstance(layer, gym.Wrapper) and "set_task" not in dir(type(layer)):
        layer = layer.env
    return layer.set_task  # type: ignore[attr-defined]


def success_of(info: Mapping[str, Any]) -> float:
    """Returns ``success`` or ``is_success`` of an info as 1 or 0, or NaN if it has neither."""
    success = info.get("success", info.get("is_success"))
    return np.nan if success is None or success != success else float(bool(success))


def close(env: gym.Env[Any, Any]) -> None:
    """Closes an environment."""
    env.close()  # type: ignore[no-untyped-call]


def obs_digest(obs: np.ndarray) -> int:
    """Returns a 64-bit hash of an observation."""
    return int.from_bytes(blake2b(obs.tobytes(), digest_size=8).digest(), "little")
