"""The same code for arrays in NumPy and tensors on a device, and for any version of PyTorch.

Nothing else in the project names what is private in PyTorch; where a version lacks it, public
operations give the same result, if more slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

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


def transformed() -> bool:
    """Whether `torch.func` transforms what runs now, as `vmap` does; true where it is unknown."""
    try:
        return torch._C._are_functorch_transforms_active()
    except AttributeError:
        return True


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, by oneDNN in full precision; it has no gradient."""
    try:
        product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return functional.linear(x, weight, bias)
    return product(x, weight, bias, "none", [], "")


def compile_graph(graph: fx.GraphModule, tensors: list[Tensor]) -> Callable[..., list[Tensor]]:
    """Machine code for operations on tensors of these shapes, which has no gradient.

    It is made at once, so that a compiler that fails does so here. `torch.compile` would check at
    every call what the code was made for.
    """
    try:
        # Others than those who compile need not wait for this import.
        from torch._inductor import compile
    except ImportError:
        public: Callable[..., list[Tensor]] = torch.compile(graph, fullgraph=True, dynamic=False)
        with torch.no_grad():
            public(*tensors)
        return public
    compiled: Callable[..., list[Tensor]] = compile(graph, [*tensors])
    return compiled


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
