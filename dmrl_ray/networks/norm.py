"""Running normalisation of what networks read and predict."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Mean and standard deviation of a stream of batches, as buffers beside the weights.

    Batch n weighs max(1/n, 1/100): a plain average first, a moving one later, so that returns
    that grow while the policy learns do not stay scaled by their beginnings.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("batches", torch.zeros(()))

    @property
    def std(self) -> Tensor:
        """Never below 1e-4: a constant input becomes 0, not noise."""
        return self.variance.clamp_min(1e-8).sqrt()

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update with a batch (N, *shape); rows that are not finite are left out."""
        x = x.double()
        mean, variance = x.mean(0), x.var(0, correction=0)
        if not torch.isfinite(mean).all():
            x = x[torch.isfinite(x).flatten(1).all(1)] if x.dim() > 1 else x[torch.isfinite(x)]
            if len(x) == 0:
                return
            mean, variance = x.mean(0), x.var(0, correction=0)
        self.batches += 1
        weight = float(max(1.0 / self.batches.item(), 0.01))
        # Of the mixture of both; a running mean of squares would lose what is small beside it.
        variance += (1 - weight) * (mean - self.mean) ** 2
        variance.clamp_(max=torch.finfo(self.variance.dtype).max)
        self.variance.lerp_(variance.to(self.variance.dtype), weight)
        self.mean.lerp_(mean.to(self.mean.dtype), weight)

    def normalize(self, x: Tensor) -> Tensor:
        """In standard deviations from the mean."""
        return (x - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return x * self.std + self.mean
