"""CAVIA: only a context vector adapts to a task; everything else is shared by all tasks.

Source: Zintgraf et al., "Fast Context Adaptation via Meta-Learning", 2019 (arXiv:1810.03642),
algorithm 2. The context phi joins the policy's input. It is zero where a task begins and moves in
the inner loop alone; the rest of the policy, theta, moves in the outer loop alone.
"""

from __future__ import annotations

from pydantic import Field

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.tasks.distribution import TaskDistribution


class CAVIA(MAML):
    """MAML that adapts ``network.context`` numbers.

    phi_i = 0 - alpha * gradient of L_i(phi = 0, theta) by phi, in the inner loop; the outer loop is
    theta <- theta - beta * gradient of the mean over tasks of L_i(phi_i, theta) by theta.
    """

    class Config(MAML.Config):
        trainable: tuple[str, ...] = Field(default=("context",), min_length=1)
        """Prefixes of the parameter names the inner loop may change."""

        inner_lr: float = Field(default=1.0, gt=0)  # Zintgraf et al. 2019, section 4.3
        """Step size of the inner loop."""

    config: Config

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        if policy.context is None:
            raise ValueError(
                "network.context: cavia adapts a context of the policy, found one of width 0; "
                "set network: {context: 8, ...}"
            )
        outer_parts = ("encoder.", "policy_head.")  # theta, without phi
        super().__init__(config, distribution, policy, outer_parts=outer_parts)
