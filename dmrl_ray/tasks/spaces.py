"""Observations with named parts, laid side by side in one vector.

One array per rollout, whatever an observation is made of: buffers, shards and checkpoints know
nothing of dictionaries, and networks that care find the parts by name.
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
    """Named parts in one float32 vector (D,), in the order given.

    Args:
        parts: a float `Box` as it is, a uint8 `Box` (an image) scaled to [0, 1], a `Discrete`
            one-hot, a `MultiDiscrete` (tokens) as its numbers.

    Raises:
        ValueError: a part is of another kind.
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
        """(B, D) of parts that are (B, ...) each."""
        num = len(next(iter(obs.values())))
        packed = np.empty((num, *self.shape), np.float32)
        for name, part in self.parts.items():
            packed[:, self.slices[name]] = _flat(part, obs[name], num)
        return packed

    def part(self, obs: Array, name: str) -> Array:
        """(..., *shape) of the part in a packed array or tensor (..., D)."""
        return obs[..., self.slices[name]].reshape(*obs.shape[:-1], *_shape(self.parts[name]))

    def without(self, names: Iterable[str]) -> Box:
        """The space of what is left; a single plain vector is just that vector.

        Raises:
            ValueError: there is no such part, or nothing is left.
        """
        unknown = [name for name in names if name not in self.parts]
        left = {name: part for name, part in self.parts.items() if name not in set(names)}
        if unknown or not left:
            raise ValueError(
                f"observations have the parts {', '.join(self.parts)}; "
                + (f"there is no {unknown[0]!r}" if unknown else "one at least must be left")
            )
        only = next(iter(left.values()))
        if len(left) == 1 and isinstance(only, Box) and len(only.shape) == 1:
            return only
        return Packed(left)

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """Indices along D of some parts."""
        every = np.arange(self.shape[0])
        return np.concatenate([every[self.slices[name]] for name in names])


def scaled_columns(space: Box) -> np.ndarray:
    """(D,) bool: the entries that running statistics should scale, which are measured numbers.

    What is one-hot, a token or a pixel has a scale already.
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
