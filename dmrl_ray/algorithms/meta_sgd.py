"""Meta-SGD: MAML that also learns how far to step, for every parameter by itself.

Source: Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017
(arXiv:1707.09835), algorithm 2. A rate may become negative: the direction is learned with the
size. All rates start at ``inner_lr`` instead of at random.
"""

from __future__ import annotations

import torch
from torch import nn

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.learn.per_task import Parameters, per_task, surrogate_loss, task_gradients
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout


class MetaSGD(MAML):
    """MAML with an inner step size for each number that adapts."""

    def __init__(
        self, config: MAML.Config, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, distribution, policy)
        self.rates = nn.ParameterDict(
            {
                _key(name): torch.full(parameter.shape[1:], config.inner_lr)
                for name, parameter in per_task(policy, 1).items()
                if name.startswith(config.trainable)
            }
        )
        policy.auxiliary["inner_lr"] = self.rates

    def adapt(
        self, params: Parameters, support: Rollout, *, create_graph: bool = False
    ) -> Parameters:
        """theta'_i = theta - alpha o gradient of L_i(theta), of every task i at once."""
        loss = surrogate_loss(self.policy, params, support)  # (N,)
        gradients = task_gradients(loss, params, self.config.trainable, create_graph=create_graph)
        return params | {n: params[n] - self.rates[_key(n)] * g for n, g in gradients.items()}


def _key(name: str) -> str:
    # A module's parameters may not have dots in their names.
    return name.replace(".", "/")
