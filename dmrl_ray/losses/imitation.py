"""Losses of learning from others' actions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dmrl_ray.losses.averages import counted_mean


def expert_action_loss(log_prob: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Cross entropy of a policy to an expert's actions.

        -log pi(a*[t] | x[t])

    Source: Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret
    Online Learning", 2011, section 2 (arXiv:1011.0686), with the log-loss as the surrogate of the
    0-1 loss; on recorded actions this is behaviour cloning.

    Args:
        log_prob: (T, B), of the expert's actions; carries the gradient.
        mask: (T, B) bool, steps that count; None is all.

    Returns:
        Scalar in nats, mean over the steps that count.
    """
    return -counted_mean(log_prob, mask)


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor) -> Tensor:
    """Cross entropy of a classifier of the expert's steps against the policy's; log 4 if blind.

        -E_expert[log D] - E_policy[log (1 - D)],  D = sigmoid(logit)

    Source: Ho and Ermon, "Generative Adversarial Imitation Learning", 2016, eq. 17
    (arXiv:1606.03476), with D the probability that a step is the expert's, where the paper's is the
    policy's.

    Args:
        expert_logit: (...), of the expert's steps.
        policy_logit: (...), of the policy's.

    Returns:
        Scalar, in nats.
    """
    return functional.softplus(-expert_logit).mean() + functional.softplus(policy_logit).mean()


def imitation_reward(logit: Tensor) -> Tensor:
    """The reward of a step by how much it looks like the expert's: -log (1 - D) > 0.

    Never negative, so that a longer episode has more of it: right where the expert's episodes are
    long, and wrong where they end early.

    Source: Ho and Ermon 2016, algorithm 1, step 5: the cost log D of the paper's D, negated.

    Args:
        logit: (...), of `discriminator_loss`'s classifier.

    Returns:
        (...).
    """
    return functional.softplus(logit)
