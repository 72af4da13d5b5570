"""Meta-SGD: MAML that also learns how far to step, for every parameter by itself.

Source: Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017
(arXiv:1707.09835), algorithm 2. A rate may become negative: the direction is learned with the
size. All rates start at ``inner_lr`` instead of at random.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.learn.per_task import per_task
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.tasks.distribution import TaskDistribution


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

    def inner_rate(self, name: str) -> Tensor:
        rate: Tensor = self.rates[_key(name)]
        return rate


def _key(name: str) -> str:
    # A module's parameters may not have dots in their names.
    return name.replace(".", "/")
