"""Probabilistic principal components: the linear model that autoencoders are measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProbabilisticPCA:
    """x = basis z + mean + noise, with z standard normal and noise of one variance."""

    mean: Tensor  # (D,)
    basis: Tensor  # (D, L)
    noise_variance: Tensor  # ()

    @classmethod
    def fit(cls, x: Tensor, latent: int) -> ProbabilisticPCA:
        """The maximum-likelihood model of rows, in closed form.

        Source: Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999, eq. 7, 8.

        Args:
            x: (N, D).
            latent: L, in [1, D - 1].

        Raises:
            ValueError: there are not as many dimensions.
        """
        if not 1 <= latent < x.shape[-1]:
            raise ValueError(f"latent is {latent}, and must be from 1 to {x.shape[-1] - 1}")
        x = x.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
        noise = values[:-latent].mean().clamp_min(1e-12)
        scale = (values[-latent:] - noise).clamp_min(0.0).sqrt()
        return cls(mean, vectors[:, -latent:] * scale, noise)

    def reconstruct(self, x: Tensor) -> Tensor:
        """(N, D) the nearest points that the model has without noise: the projection of PCA."""
        directions = torch.linalg.qr(self.basis).Q
        return self.mean + (x.double() - self.mean) @ directions @ directions.T

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(N,) log-densities in nats; eq. 4, by the Woodbury identity."""
        width, latent = self.basis.shape
        offset = x.double() - self.mean
        inner = self.basis.T @ self.basis + self.noise_variance * torch.eye(latent).double()
        along = offset @ self.basis
        solved = torch.linalg.solve(inner, along.T).T
        squared = (offset.square().sum(-1) - (along * solved).sum(-1)) / self.noise_variance
        log_det = torch.logdet(inner) + (width - latent) * self.noise_variance.log()
        return -0.5 * (squared + log_det + width * math.log(2 * math.pi))
