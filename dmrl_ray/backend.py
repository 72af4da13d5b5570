"""Operations that are the same for arrays in NumPy and tensors on a device."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.types import Array


class TensorStream:
    """Random numbers made on a device, by the names that NumPy's generators give them.

    Args:
        seed: a stream that gives the seed.
        device: where the numbers are made and stay.
    """

    def __init__(self, seed: np.random.Generator, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(int(seed.integers(2**63)))

    def random(self, size: int | tuple[int, ...]) -> Tensor:
        """float64, uniform on [0, 1)."""
        return self._empty(size, torch.float64).uniform_(generator=self._generator)

    def standard_normal(self, size: int | tuple[int, ...], dtype: Any = np.float64) -> Tensor:
        """Mean 0 and standard deviation 1."""
        return self._empty(size, _TYPES[dtype]).normal_(generator=self._generator)

    def standard_exponential(self, size: int | tuple[int, ...], dtype: Any = np.float64) -> Tensor:
        """Mean 1."""
        return self._empty(size, _TYPES[dtype]).exponential_(generator=self._generator)

    def _empty(self, size: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._generator.device)


_TYPES = {np.float32: torch.float32, np.float64: torch.float64}

MANY = 100_000
"""Numbers in a permutation from which on it is drawn on the device."""

Stream: TypeAlias = np.random.Generator | TensorStream


def permutation(rng: np.random.Generator, n: int, device: torch.device) -> Tensor:
    """(n,) the numbers below n in random order.

    Few are drawn on the host, the same ones for every device. Millions would take longer to draw
    there than a GPU takes to learn from them, and are drawn where they are needed.
    """
    if device.type == "cpu" or n < MANY:
        return torch.from_numpy(rng.permutation(n)).to(device)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
    return torch.randperm(n, generator=generator, device=device)


def namespace(x: Array) -> Any:
    """``numpy`` or ``torch``: where the functions of x are."""
    return torch if isinstance(x, Tensor) else np


def host(x: Array) -> np.ndarray:
    """As an array, whose memory may be shared."""
    return x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def as_kind_of(array: Array, x: Tensor) -> Array:
    """A tensor, as an array where `array` is one."""
    return x if isinstance(array, Tensor) else x.numpy()


def copy_of(x: Array) -> Array:
    """The same numbers in memory of their own."""
    return x.clone() if isinstance(x, Tensor) else x.copy()


def resized(x: Array, length: int) -> Array:
    """The first `length` rows of x, a view; where x has fewer, a copy with rows of zeros behind."""
    if length <= len(x):
        return x[:length]
    shape = (length, *x.shape[1:])
    longer = x.new_zeros(shape) if isinstance(x, Tensor) else np.zeros(shape, x.dtype)
    longer[: len(x)] = x
    return longer
