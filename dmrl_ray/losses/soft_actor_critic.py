"""Soft actor-critic: values that count the policy's entropy, for both kinds of actions.

The policy maximises the soft value of the states it meets, so that value and policy loss are the
same quantity up to its sign and where gradients pass. K critics give K estimates of Q; the smallest
counts (Fujimoto et al. 2018, arXiv:1802.09477).

Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv:1812.05905).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmrl_ray.losses.shapes import check_shapes


def soft_value(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """Value of states by one action sampled in each, eq. 3.

        V = min_k Q_k(s, a) - temperature * log pi(a | s)

    Args:
        q: (K, ...), of the sampled actions.
        log_prob: (...), of the sampled actions.
        temperature: scalar, what a nat of entropy is worth.

    Returns:
        (...).
    """
    return q.amin(0) - temperature * log_prob


def categorical_soft_value(q: Tensor, logits: Tensor, temperature: Tensor) -> Tensor:
    """Value of states, exactly, over all discrete actions.

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
    """What Q shall be, eq. 2: ``reward + gamma * next_value`` without gradient.

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
    """Half the squared error of every critic, summed over them, eq. 5.

    Args:
        q: (K, ...), carries the gradient.
        target: (...), the same for all critics.

    Returns:
        (...).
    """
    return 0.5 * (q - target).square().sum(0)


def temperature_loss(log_temperature: Tensor, entropy: Tensor, *, target: float) -> Tensor:
    """Raises the temperature where the policy's entropy is below its target, eq. 18.

    The logarithm stands in place of the temperature, which must stay positive.

    Args:
        log_temperature: scalar, carries the gradient.
        entropy: (...) in nats, of the policy or estimated by ``-log_prob``.
        target: nats.

    Returns:
        (...).
    """
    return log_temperature * (entropy.detach() - target)
