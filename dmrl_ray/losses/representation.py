"""Losses of autoencoders."""

from __future__ import annotations

import math

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
