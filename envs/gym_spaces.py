"""Conversion of external environments' spaces to the policy's observation and action spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from dmrl_ray.tasks.spaces import Packed


def observation_space(space: gym.Space[Any]) -> Box:
    """Returns the policy's observation space.

    Bytes are unchanged, other boxes float32, integers one-hot. Dictionaries, tuples and several
    integers become named parts of one vector.

    Raises:
        ValueError: the space is not supported.
    """
    if isinstance(space, Discrete):
        return Box(0.0, 1.0, (int(space.n),), np.float32)
    if isinstance(space, Box):
        return _box(space)
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple | MultiDiscrete | MultiBinary):
        return Packed({name: _part(name, part) for name, part in leaves(space)})
    raise ValueError(
        f"observations are a {type(space).__name__}; a Box, Discrete, MultiDiscrete, MultiBinary, "
        "or a Dict or Tuple of these is needed"
    )


def leaves(space: gym.Space[Any], name: str = "") -> Iterator[tuple[str, gym.Space[Any]]]:
    """Yields the leaf spaces of nested dictionaries and tuples with their dotted names.

    A space that is no dictionary or tuple is named ``obs``.
    """
    if isinstance(space, gym.spaces.Dict):
        children: Mapping[Any, gym.Space[Any]] = space.spaces
    elif isinstance(space, gym.spaces.Tuple):
        children = dict(enumerate(space.spaces))
    else:
        yield name or "obs", space
        return
    for key, part in children.items():
        yield from leaves(part, f"{name}.{key}" if name else str(key))


def contents(space: gym.Space[Any], raw: Any) -> Iterator[Any]:
    """Yields the values of an observation, one for each of the `leaves`.

    Raises:
        KeyError, TypeError, ValueError: its structure is not that of the space.
    """
    if isinstance(space, gym.spaces.Dict):
        for key, part in space.spaces.items():
            yield from contents(part, raw[key])
    elif isinstance(space, gym.spaces.Tuple):
        for part, value in zip(space.spaces, raw, strict=True):
            yield from contents(part, value)
    else:
        yield raw


def _part(name: str, space: gym.Space[Any]) -> gym.Space[Any]:
    if isinstance(space, Discrete | MultiDiscrete):
        return space
    if isinstance(space, MultiBinary):
        return Box(0.0, 1.0, space.shape, np.float32)
    if isinstance(space, Box):
        return _box(space)
    raise ValueError(f"part {name!r} of the observations is a {type(space).__name__}")


def _box(space: Box) -> Box:
    if space.dtype == np.uint8:
        return space
    low, high = (_to_float32(bound) for bound in (space.low, space.high))
    return Box(low, high, dtype=np.float32)


def _to_float32(bound: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Bounds beyond float32 become infinite.
        return bound.astype(np.float32)


def action_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """Returns the policy's action space: a Discrete from 0, or a Box [-1, 1].

    Raises:
        ValueError: the space is not supported.
    """
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, Box):
        raise ValueError(f"actions are a {type(space).__name__}; a Box or Discrete is needed")
    if not space.is_bounded():
        raise ValueError(f"actions are unbounded, {space}; a Box with finite bounds is needed")
    return Box(-1.0, 1.0, space.shape, np.float32)


def action_map(space: gym.Space[Any]) -> Callable[[Any], Any]:
    """Returns a function that maps actions of `action_space` to the environment's."""
    if isinstance(space, Discrete):
        start = int(space.start)
        return lambda action: int(action) + start
    assert isinstance(space, Box)
    middle, half = (space.high + space.low) / 2.0, (space.high - space.low) / 2.0
    dtype = space.dtype
    return lambda action: (middle + half * np.clip(action, -1.0, 1.0)).astype(dtype)
