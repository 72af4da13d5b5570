"""Losses of learning from others' actions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor) -> Tensor:
    """How badly a classifier tells an expert's steps from the policy's; log 4 if not at all.

        -E_expert[log D] - E_policy[log (1 - D)],  D = sigmoid(logit)

    Source: Ho and Ermon, "Generative Adversarial Imitation Learning", 2016, eq. 17
    (arXiv:1606.03476), with D the chance of being the expert's, where the paper's is the policy's.

    Args:
        expert_logit: (...), of the expert's steps.
        policy_logit: (...), of the policy's.

    Returns:
        Scalar, in nats.
    """
    return functional.softplus(-expert_logit).mean() + functional.softplus(policy_logit).mean()


def imitation_reward(logit: Tensor) -> Tensor:
    """What a step is worth by how much it looks like the expert's: -log (1 - D) > 0.

    Never negative, so that a policy is also paid for living on: right where experts live long, and
    wrong where they end an episode early.

    Source: Ho and Ermon 2016, algorithm 1, step 5: the cost log D of the paper's D, negated.

    Args:
        logit: (...), of `discriminator_loss`'s classifier.

    Returns:
        (...).
    """
    return functional.softplus(logit)
