"""Losses of soft actor-critic, for continuous and for discrete actions.

The actor maximises the soft value, so that its loss is minus the value by which critics bootstrap,
with gradients to the policy. Of K critics the smallest Q counts (Fujimoto et al. 2018,
arXiv:1802.09477).

Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv:1812.05905).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmrl_ray.losses.shapes import check_shapes


def soft_value(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """Soft value, estimated by one action sampled in each state, eq. 3; minus it is eq. 9.

        V = min_k Q_k(s, a) - temperature * log pi(a | s)

    Args:
        q: (K, ...), of the sampled actions.
        log_prob: (...), of the sampled actions.
        temperature: scalar, alpha in the paper.

    Returns:
        (...).
    """
    return q.amin(0) - temperature * log_prob


def categorical_soft_value(q: Tensor, logits: Tensor, temperature: Tensor) -> Tensor:
    """Soft value, as the expectation over all discrete actions.

        V = sum_a pi(a | s) (min_k Q_k(s, a) - temperature * log pi(a | s))

    Source: Christodoulou, "Soft Actor-Critic for Discrete Action Settings", 2019, eq. 10
    (arXiv:1910.07207).

    Args:
        q: (K, ..., A).
        logits: (..., A), of the policy.
        temperature: scalar.

    Returns:
        (...).
    """
    log_pi = logits.log_softmax(-1)
    return (log_pi.exp() * (q.amin(0) - temperature * log_pi)).sum(-1)


def soft_q_target(
    reward: Tensor, next_value: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """The target of Q, eq. 2: ``reward + gamma * next_value`` without gradient.

    A terminated step has no successor; one that a time limit cut off has.

    Args:
        reward: (...).
        next_value: (...), the soft value of the true successor.
        terminated: (...) bool.
        gamma: discount per environment step.

    Returns:
        (...).

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(reward=reward, next_value=next_value, terminated=terminated)
    with torch.no_grad():
        return reward + gamma * next_value.masked_fill(terminated, 0.0)


def soft_q_loss(q: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of each critic, summed over critics, eq. 5.

    Args:
        q: (K, ...), carries the gradient.
        target: (...), the same for all critics.

    Returns:
        (...).
    """
    return 0.5 * (q - target).square().sum(0)


def temperature_loss(log_temperature: Tensor, entropy: Tensor, *, target: float) -> Tensor:
    """Loss that raises the temperature where the entropy is below its target, eq. 18.

        J(alpha) = E[-alpha * log pi(a | s) - alpha * target]

    It is taken of log alpha in place of alpha, which must stay positive.

    Args:
        log_temperature: scalar, carries the gradient.
        entropy: (...) in nats, of the policy or estimated by ``-log_prob``.
        target: nats.

    Returns:
        (...).
    """
    return log_temperature * (entropy.detach() - target)
