"""Policy-gradient losses, and the value loss that goes with them."""

from __future__ import annotations

import torch
from torch import Tensor

from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.shapes import check_shapes


def ppo_clip_loss(
    log_prob: Tensor,
    behaviour_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: float,
    mask: Tensor | None = None,
    dim: tuple[int, ...] | None = None,
) -> Tensor:
    """PPO's clipped surrogate, negated so that it is minimised.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 7
    (arXiv:1707.06347).

    Args:
        log_prob: (T, B), under the policy being trained; carries the gradient.
        behaviour_log_prob: (T, B), under the policy that acted.
        advantage: (T, B).
        clip: half-width of the trust interval around ratio 1; 0.2 in the paper.
        mask: (T, B) bool, steps that count; None is all.
        dim: axes that the mean is over; None is all.

    Returns:
        Mean over `dim` of the steps that count.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(log_prob=log_prob, behaviour_log_prob=behaviour_log_prob, advantage=advantage)
    ratio = (log_prob - behaviour_log_prob).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -counted_mean(torch.minimum(ratio * advantage, clipped * advantage), mask, dim)


def policy_gradient_loss(
    log_prob: Tensor, advantage: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """The policy gradient's surrogate, negated: its gradient is that of the return.

        -log pi(a[t] | x[t]) A[t]

    Source: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
    Actor-Learner Architectures", 2018, section 4.2 (arXiv:1802.01561), where the advantage is
    weighted by V-trace's rho.

    Args:
        log_prob: (T, B), under the policy being trained; carries the gradient.
        advantage: (T, B), without gradient.
        mask: (T, B) bool, steps that count; None is all.

    Returns:
        Scalar, mean over the steps that count.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(log_prob=log_prob, advantage=advantage)
    return -counted_mean(log_prob * advantage, mask)


def value_loss(value: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Half the squared error of the value function.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, L^VF of eq. 9
    (arXiv:1707.06347); the half is Espeholt et al. 2018, section 4.2.

    Args:
        value: (T, B), carries the gradient.
        target: (T, B).
        mask: (T, B) bool, steps that count; None is all.

    Returns:
        Scalar, mean over the steps that count.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(value=value, target=target)
    return 0.5 * counted_mean((value - target).square(), mask)


def likelihood_ratio_loss(
    log_prob: Tensor,
    behaviour_log_prob: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    dim: tuple[int, ...] | None = None,
) -> Tensor:
    """Policy gradient as an importance-weighted surrogate, negated.

    Its value at ``log_prob == behaviour_log_prob`` is minus the mean advantage and its gradient
    there the policy gradient; away from there it still estimates the return of the policy being
    trained, which ``log_prob * advantage`` does not. MAML's outer gradient needs that.

    Source: Rothfuss et al., "ProMP: Proximal Meta-Policy Search", 2019, eq. 4 with the ratio of
    eq. 9 (arXiv:1810.06784).

    Args:
        log_prob: (T, B), carries the gradient.
        behaviour_log_prob: (T, B), under the policy that acted.
        advantage: (T, B).
        mask: (T, B) bool, steps that count; None is all.
        dim: axes that the mean is over; None is all.

    Returns:
        Mean over `dim` of the steps that count.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(log_prob=log_prob, behaviour_log_prob=behaviour_log_prob, advantage=advantage)
    return -counted_mean((log_prob - behaviour_log_prob).exp() * advantage, mask, dim)
