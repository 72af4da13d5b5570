"""Diagonal Gaussians over latent variables: samples, and the distance between two of them.

A Gaussian is its mean and the logarithm of its variance, both (..., L) with L latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dmrl_ray.losses.shapes import check_shapes


def gaussian_sample(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """A sample through which gradients reach mean and variance.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4
    (arXiv:1312.6114).

    Args:
        mean: (..., L).
        log_var: (..., L).
        noise: (..., L), standard normal.

    Returns:
        (..., L).
    """
    return mean + (0.5 * log_var).exp() * noise


def gaussian_kl(mean: Tensor, log_var: Tensor, prior_mean: Tensor, prior_log_var: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a diagonal Gaussian from another, KL(posterior || prior).

        KL = 1/2 sum_l [prior_log_var - log_var - 1 + (var + (mean - prior_mean)^2) / prior_var]

    Args:
        mean: (..., L), of the posterior.
        log_var: (..., L), of the posterior.
        prior_mean: (..., L); zeros with a log-variance of zeros are the standard normal.
        prior_log_var: (..., L).

    Returns:
        (...), in nats.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(mean=mean, log_var=log_var, prior_mean=prior_mean, prior_log_var=prior_log_var)
    change = log_var - prior_log_var
    squared = (mean - prior_mean).square() * (-prior_log_var).exp()
    return 0.5 * (change.exp() - 1.0 - change + squared).sum(-1)


def chained_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL of each posterior from the one a step before; of the first from the standard normal.

        KL(q(m | tau_:t) || q(m | tau_:t-1)),  q(m | tau_:-1) = N(0, 1)

    The previous posterior is the prior, so that a step without information costs nothing.

    Source: Zintgraf et al., "VariBAD", 2020, section 3.1 (arXiv:1910.08348).

    Args:
        mean: (T, B, L), of the posteriors after 0, 1, ... steps.
        log_var: (T, B, L).

    Returns:
        (T, B), in nats.
    """
    prior_mean, prior_log_var = (
        torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (mean, log_var)
    )
    return gaussian_kl(mean, log_var, prior_mean, prior_log_var)


def reconstruction_loss(
    predicted: Tensor, target: Tensor, *, binary: bool, mask: Tensor | None = None
) -> Tensor:
    """Minus the log-likelihood of whole trials given samples of posteriors, up to a constant.

        -log p(tau | m) = sum_t error(predicted[t], target[t])

    Source: Zintgraf et al., "VariBAD", 2020, eq. 8 (arXiv:1910.08348).

    Args:
        predicted: (S, T, B, D), from S samples each, of all T steps of B trials.
        target: (T, B, D), what happened.
        binary: False takes squared errors, of Gaussians; True takes `predicted` for logits of the
            probability that `target` is positive, and the cross entropy.
        mask: (S, T, B) bool, predictions that count; None is all.

    Returns:
        Scalar, sum over T and D, mean over the S and B of which any counts.

    Raises:
        ValueError: the tensors do not fit together.
    """
    check_shapes(target=target, **{"predicted[0]": predicted[0]})
    target = target.expand_as(predicted)
    if binary:
        positive = (target > 0).to(predicted.dtype)
        error = functional.binary_cross_entropy_with_logits(predicted, positive, reduction="none")
    else:
        error = (predicted - target).square()
    if mask is None:
        return error.sum((1, 3)).mean()
    return (error.sum(3) * mask).sum() / mask.any(1).sum().clamp_min(1)


def negative_elbo(reconstruction: Sequence[Tensor], kl: Tensor, *, kl_weight: float) -> Tensor:
    """Minus the evidence lower bound, averaged over the steps t that a posterior is taken at.

        -ELBO_t = E_{m ~ q(m | tau_:t)}[-log p(tau | m)] + kl_weight * KL_t

    Source: Zintgraf et al., "VariBAD", 2020, eq. 7 (arXiv:1910.08348).

    Args:
        reconstruction: scalars, from `reconstruction_loss`, of rewards and of observations.
        kl: scalar, the mean of `chained_kl`.
        kl_weight: 1 in the bound.

    Returns:
        Scalar.
    """
    return torch.stack(list(reconstruction)).sum() + kl_weight * kl


def product_of_gaussians(precision: Tensor, weighted_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The standard normal prior times N Gaussian factors, which is a Gaussian again.

        1 / var = 1 + sum_n precision[n]        mean = var * sum_n precision[n] * mean[n]

    The order of the factors does not matter, their sums suffice, and none at all is the prior,
    which the paper leaves out of its product.

    Source: Rakelly et al., "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic
    Context Variables", 2019, section 4.1 (arXiv:1903.08254).

    Args:
        precision: (..., N, L), the inverse variance of each factor.
        weighted_mean: (..., N, L), the mean of each times its precision.

    Returns:
        Mean and log-variance, (..., L) each.
    """
    total = 1.0 + precision.sum(-2)
    return weighted_mean.sum(-2) / total, -total.log()
