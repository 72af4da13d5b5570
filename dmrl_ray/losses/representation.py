"""What an autoencoder loses, and the linear model that it is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmrl_ray.losses.latent import gaussian_kl
from dmrl_ray.losses.shapes import check_shapes


def negative_evidence_bound(
    x: Tensor, reconstruction: Tensor, mean: Tensor, log_var: Tensor, *, beta: float = 1.0
) -> Tensor:
    """The bound that a variational autoencoder is trained on, negated: (..., D) -> (...) in nats.

        1/2 |x - reconstruction|^2 + D/2 log(2 pi) + beta KL(N(mean, var) || N(0, 1))

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, eq. 7 with a Gaussian of
    unit variance as the decoder (arXiv:1312.6114); Higgins et al., "beta-VAE", 2017, for `beta`.

    Args:
        x: (..., D).
        reconstruction: (..., D), from a sample of the posterior.
        mean: (..., L), of the posterior.
        log_var: (..., L), of the posterior.
        beta: weight of the divergence from the prior.

    Returns:
        (...), per row.

    Raises:
        ValueError: the tensors do not fit together.
    """
    check_shapes(x=x, reconstruction=reconstruction)
    zero = torch.zeros_like(mean)
    squared = 0.5 * (x - reconstruction).square().sum(-1)
    constant = 0.5 * x.shape[-1] * math.log(2 * math.pi)
    return squared + constant + beta * gaussian_kl(mean, log_var, zero, zero)


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
