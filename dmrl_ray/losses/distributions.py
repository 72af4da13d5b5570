"""Log-probabilities, entropies and divergences of the distributions in use."""

from __future__ import annotations

import math

from torch import Tensor


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of discrete actions.

    Args:
        logits: (..., A), not normalised.
        action: (...) int64.

    Returns:
        (...).
    """
    chosen = logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of categorical distributions; (..., A) -> (...)."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return -(log_p.exp() * log_p).sum(-1)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of diagonal Gaussian actions; all (..., A) -> (...)."""
    z = (action - mean) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - (log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of diagonal Gaussians; (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
