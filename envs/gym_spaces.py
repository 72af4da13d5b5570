"""Spaces of external environments, and what the policy sees of them and chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from dmrl_ray.tasks.spaces import Packed


def observation_space(space: gym.Space[Any]) -> Box:
    """What the policy sees: bytes as they are, other boxes in float32, integers one-hot.

    Dictionaries, tuples and several integers become named parts, side by side in one vector.

    Raises:
        ValueError: a policy cannot see it.
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
    """The spaces within dictionaries and tuples by their dotted names; ``obs`` if there is one."""
    if isinstance(space, gym.spaces.Dict):
        inside: Mapping[Any, gym.Space[Any]] = space.spaces
    elif isinstance(space, gym.spaces.Tuple):
        inside = dict(enumerate(space.spaces))
    else:
        yield name or "obs", space
        return
    for key, part in inside.items():
        yield from leaves(part, f"{name}.{key}" if name else str(key))


def contents(space: gym.Space[Any], raw: Any) -> Iterator[Any]:
    """What an observation holds for each of the `leaves`.

    Raises:
        KeyError, TypeError, ValueError: it is not built as its space.
    """
    if isinstance(space, gym.spaces.Dict):
        for key, part in space.spaces.items():
            yield from contents(part, raw[key])
    elif isinstance(space, gym.spaces.Tuple):
        for part, inside in zip(space.spaces, raw, strict=True):
            yield from contents(part, inside)
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
    with np.errstate(over="ignore"):  # what is too large becomes infinite, as it should
        return bound.astype(np.float32)


def action_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """What the policy chooses from: Discrete from 0, or a Box [-1, 1]."""
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, Box):
        raise ValueError(f"actions are a {type(space).__name__}; a Box or Discrete is needed")
    if not space.is_bounded():
        raise ValueError(f"actions are unbounded, {space}; a Box with finite bounds is needed")
    return Box(-1.0, 1.0, space.shape, np.float32)


def action_map(space: gym.Space[Any]) -> Callable[[Any], Any]:
    """From `action_space` to the environment's own."""
    if isinstance(space, Discrete):
        start = int(space.start)
        return lambda action: int(action) + start
    assert isinstance(space, Box)
    middle, half = (space.high + space.low) / 2.0, (space.high - space.low) / 2.0
    dtype = space.dtype
    return lambda action: (middle + half * np.clip(action, -1.0, 1.0)).astype(dtype)
