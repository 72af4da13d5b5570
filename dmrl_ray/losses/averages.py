"""Means over the steps that count."""

from __future__ import annotations

from torch import Tensor


def counted_mean(x: Tensor, mask: Tensor | None, dim: tuple[int, ...] | None = None) -> Tensor:
    """Mean over the entries that count; 0 where none does.

    Args:
        x: any shape.
        mask: bool, of the same shape; None counts all.
        dim: axes that the mean is over; None is all.

    Returns:
        x without these axes.
    """
    if mask is None:
        return x.mean(dim)
    zeroed = x.masked_fill(~mask, 0.0)
    return zeroed.sum(dim) / mask.sum(dim).clamp_min(1)
