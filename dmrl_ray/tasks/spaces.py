"""Observations with named parts, concatenated into one vector.

A rollout thus has one observation array whatever its structure: buffers, shards and checkpoints
need not handle dictionaries, and networks look parts up by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from dmrl_ray.types import Array


class Packed(Box):
    """A float32 vector (D,) of named parts, in the order given.

    Args:
        parts: the spaces of the parts. A float `Box` is unchanged, a uint8 `Box` (an image) is
            scaled to [0, 1], a `Discrete` one-hot, a `MultiDiscrete` (tokens) kept as integers.

    Raises:
        ValueError: a part has another type of space.
    """

    def __init__(self, parts: Mapping[str, gym.Space[Any]]) -> None:
        self.parts = dict(parts)
        self.slices: dict[str, slice] = {}
        start = 0
        for name, part in self.parts.items():
            stop = start + _width(name, part)
            self.slices[name] = slice(start, stop)
            start = stop
        super().__init__(-np.inf, np.inf, (start,), np.float32)

    def pack(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Concatenates parts, (B, ...) each, to (B, D)."""
        num = len(next(iter(obs.values())))
        packed = np.empty((num, *self.shape), np.float32)
        for name, part in self.parts.items():
            packed[:, self.slices[name]] = _flat(part, obs[name], num)
        return packed

    def part(self, obs: Array, name: str) -> Array:
        """Returns a part (..., *shape) of a packed array or tensor (..., D)."""
        return obs[..., self.slices[name]].reshape(*obs.shape[:-1], *_shape(self.parts[name]))

    def without(self, names: Iterable[str]) -> Box:
        """Returns the space without some parts; a single remaining vector is a plain Box.

        Raises:
            ValueError: there is no such part, or none remains.
        """
        unknown = [name for name in names if name not in self.parts]
        left = {name: part for name, part in self.parts.items() if name not in set(names)}
        if unknown or not left:
            raise ValueError(
                f"observations have the parts {', '.join(self.parts)}; "
                + (f"there is no {unknown[0]!r}" if unknown else "at least one must remain")
            )
        only = next(iter(left.values()))
        if len(left) == 1 and isinstance(only, Box) and len(only.shape) == 1:
            return only
        return Packed(left)

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices of some parts along D."""
        indices = np.arange(self.shape[0])
        return np.concatenate([indices[self.slices[name]] for name in names])


def scaled_columns(space: Box) -> np.ndarray:
    """Returns which entries running statistics should normalize, (D,) bool.

    One-hot entries, tokens and pixels have a known scale already.
    """
    if not isinstance(space, Packed):
        return np.full(space.shape, space.dtype != np.uint8)
    kinds = [
        np.full(_width(name, part), isinstance(part, Box) and part.dtype != np.uint8)
        for name, part in space.parts.items()
    ]
    return np.concatenate(kinds)


def _shape(part: gym.Space[Any]) -> tuple[int, ...]:
    if isinstance(part, Discrete):
        return (int(part.n),)
    return tuple(part.shape or (1,))


def _width(name: str, part: gym.Space[Any]) -> int:
    if not isinstance(part, (Box, Discrete, MultiDiscrete)):
        raise ValueError(
            f"the observation's part {name!r} is a {type(part).__name__}; a Box, Discrete or "
            "MultiDiscrete is needed"
        )
    return math.prod(_shape(part))


def _flat(part: gym.Space[Any], value: np.ndarray, num: int) -> np.ndarray:
    if isinstance(part, Discrete):
        index = np.asarray(value).reshape(num, 1) - part.start
        return (index == np.arange(int(part.n))).astype(np.float32)
    flat = np.asarray(value, np.float32).reshape(num, -1)
    return flat / np.float32(255) if part.dtype == np.uint8 else flat
