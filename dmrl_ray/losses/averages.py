"""Means and scales over the steps that count."""

from __future__ import annotations

import math

import torch
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


def standardized(
    x: Tensor, mask: Tensor | None = None, dim: tuple[int, ...] | None = None
) -> Tensor:
    """With mean 0 and standard deviation 1 over the entries that count.

    A single entry differs from no other, and becomes 0.

    Args:
        x: any shape.
        mask: bool, of the same shape; None counts all.
        dim: axes that mean and deviation are over; None is all.

    Returns:
        The shape of x; 0 where an entry does not count.
    """
    if mask is None:
        axes = range(x.dim()) if dim is None else dim
        several = math.prod(x.shape[axis] for axis in axes) > 1
        mean = x.mean(dim, keepdim=True)
        std = x.std(dim, correction=int(several), keepdim=True)
        return (x - mean) / (std + 1e-8)
    if dim is None:
        rows = torch.zeros_like(x)
        rows[mask] = standardized(x[mask])
        return rows
    count = mask.sum(dim, keepdim=True)
    off = (x - (x * mask).sum(dim, keepdim=True) / count.clamp_min(1)) * mask
    std = (off.square().sum(dim, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return off / (std + 1e-8)
