"""One gymnasium environment behind the checks of the contract: what it returns is finite, has the
shape it promised, and an error says where it happened.
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
    """An environment did not repeat itself, so that an open episode cannot be restored."""


class GymColumn:
    """An environment on one task, with the memory of how its episode came about."""

    def __init__(
        self,
        make: Callable[..., gym.Env[Any, Any]],
        apply: Apply,
        max_episode_steps: int,
        column: int,
    ):
        self.env = make()
        self.max_episode_steps = max_episode_steps
        self.column = column
        self.seed = -1  # no episode yet
        self.actions: list[Any] = []
        self._make = make
        self._apply = apply
        self._space = observation_space(self.env.observation_space)
        self._action = action_map(self.env.action_space)

    def start(self, values: Values, seed: int, *, changed: bool) -> np.ndarray:
        """Become the task, if it is another one, and reset with the seed."""
        self.seed, self.actions = seed, []
        try:
            if changed:
                self.become(values)
            answer = self.env.reset(seed=seed)
        except Exception as error:  # an external environment may raise anything
            self._fail("reset", f"raised {type(error).__name__}: {error}", error)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            self._fail("reset", "did not return (observation, info)")
        return self._observation(answer[0])

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Mapping[str, Any]]:
        """One step; truncated at the latest after `max_episode_steps`."""
        self.actions.append(action)
        try:
            answer = self.env.step(self._action(action))
        except Exception as error:  # an external environment may raise anything
            self._fail("step", f"raised {type(error).__name__}: {error}", error)
        if not (isinstance(answer, tuple) and len(answer) == 5):
            self._fail("step", "did not return (observation, reward, terminated, truncated, info)")
        raw, reward, terminated, truncated, info = answer
        for field, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                self._fail(field, f"is {flag!r}, not a bool")
        late = len(self.actions) >= self.max_episode_steps
        obs = self._observation(raw)
        return obs, self._reward(reward), bool(terminated), bool(truncated or late), info

    def replay(self, values: Values, seed: int, actions: np.ndarray, digest: int) -> np.ndarray:
        """Live through an episode again, up to an observation that must have this digest."""
        obs = self.start(values, seed, changed=True)
        for action in actions:
            obs = self.step(action)[0]
        if obs_digest(obs) != digest:
            raise EnvNotDeterministic(
                f"{self._name()}: column {self.column}: repeating the {len(actions)} actions since "
                f"the reset with seed {seed} led to another observation; "
                "its randomness must come from self.np_random for a run to be resumed"
            )
        return obs

    def become(self, values: Values) -> None:
        """Take the values of a task over."""
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
            inside = list(contents(space, raw))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            self._fail("observation", f"is not built as {space} ({found})", error)
        arrays = {}
        for (name, part), value in zip(leaves(space), inside, strict=True):
            seen = self._space.parts[name]
            arrays[name] = self._checked(f"observation[{name!r}]", part, seen, value)[None]
        return self._space.pack(arrays)[0]

    def _checked(
        self, field: str, space: gym.Space[Any], seen: gym.Space[Any], raw: Any
    ) -> np.ndarray:
        """What the environment gave for a space, as an array that can be `seen`."""
        array = np.asarray(raw)
        if isinstance(space, Discrete | MultiDiscrete):
            if not (array.shape == space.shape and array.dtype.kind in "iu" and array in space):
                self._fail(field, f"is {raw!r}, not in {space}")
            return array
        if array.dtype.kind not in "fiub":
            self._fail(field, f"is {raw!r}, not an array of numbers")
        if array.shape != seen.shape:
            self._fail(field, f"has shape {array.shape}, its space has {seen.shape}")
        if seen.dtype == np.uint8 and array.dtype != np.uint8:
            self._fail(field, f"is {array.dtype}, its space is uint8")
        with np.errstate(over="ignore"):  # becomes infinite and is found in the next line
            array = array.astype(seen.dtype)
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
            f"{self._name()}: column {self.column}, episode seed {self.seed}, "
            f"step {len(self.actions)}: {field} {found}"
        ) from cause

    def _name(self) -> str:
        spec = self.env.unwrapped.spec
        return spec.id if spec else type(self.env.unwrapped).__name__


def find_attribute(env: gym.Env[Any, Any], name: str) -> tuple[Any, str]:
    """The object that holds a dotted attribute of the unwrapped environment, and its last part.

    Raises:
        AttributeError: there is none.
    """
    *path, last = name.split(".")
    owner = reduce(getattr, path, env.unwrapped)
    getattr(owner, last)
    return owner, last


def find_set_task(env: gym.Env[Any, Any]) -> Callable[[dict[str, bool | int | float]], None]:
    """The outermost `set_task` of an environment and its wrappers.

    Raises:
        AttributeError: there is none.
    """
    layer = env
    while isinstance(layer, gym.Wrapper) and "set_task" not in dir(type(layer)):
        layer = layer.env
    return layer.set_task  # type: ignore[attr-defined]


def told_success(info: Mapping[str, Any]) -> float:
    """1 or 0 as a step's info says under ``success`` or ``is_success``; NaN if it does not say."""
    told = info.get("success", info.get("is_success"))
    return np.nan if told is None or told != told else float(bool(told))


def close(env: gym.Env[Any, Any]) -> None:
    """Close an environment."""
    env.close()  # type: ignore[no-untyped-call]


def obs_digest(obs: np.ndarray) -> int:
    """64 bits that tell observations apart."""
    return int.from_bytes(blake2b(obs.tobytes(), digest_size=8).digest(), "little")
