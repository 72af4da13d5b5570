"""Log-probabilities, entropies and divergences of the distributions in use."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus


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


def categorical_log_prob_and_entropy(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the above at once, in a third of their time.

    PyTorch normalises over the first axis several times as fast as over a short last one.

    Args:
        logits: (..., A), not normalised.
        action: (...) int64.

    Returns:
        (...) each.
    """
    log_p = logits.movedim(-1, 0).contiguous().log_softmax(0)
    return log_p.gather(0, action.unsqueeze(0)).squeeze(0), -(log_p.exp() * log_p).sum(0)


def categorical_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL divergence in nats of categorical distributions from `other`; both (..., A) -> (...)."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    log_q = other - other.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of diagonal Gaussian actions; all (..., A) -> (...)."""
    z = (action - mean) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - (log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of diagonal Gaussians; (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def squashed_gaussian_log_prob(mean: Tensor, log_std: Tensor, unsquashed: Tensor) -> Tensor:
    """Log-density of ``tanh(unsquashed)``, where `unsquashed` is diagonal Gaussian.

    log(1 - tanh(u)^2) is written as 2 (log 2 - u - softplus(-2u)), which stays finite where
    tanh(u) rounds to 1.

    Source: Haarnoja et al., "Soft Actor-Critic", 2018, appendix C (arXiv:1801.01290).

    Args:
        mean: (..., A).
        log_std: (..., A).
        unsquashed: (..., A), the actions before tanh.

    Returns:
        (...), with respect to the squashed actions.
    """
    slope = 2.0 * (math.log(2.0) - unsquashed - softplus(-2.0 * unsquashed))
    return gaussian_log_prob(mean, log_std, unsquashed) - slope.sum(-1)
