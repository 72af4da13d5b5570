"""The check of shapes that every public loss begins with."""

from __future__ import annotations

from torch import Tensor


def check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError naming the first tensor whose shape differs from the first one's."""
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {first} has {tuple(expected.shape)}"
            )
