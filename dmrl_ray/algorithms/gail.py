"""Generative adversarial imitation: PPO on how much its steps look like an expert's.

Source: Ho and Ermon, "Generative Adversarial Imitation Learning", 2016 (arXiv:1606.03476),
algorithm 1, with PPO in place of TRPO. The discriminator travels with the policy, so that workers
give its reward, as they give all rewards; the episodes table keeps the environment's own returns.
Left out: the causal entropy term beyond PPO's entropy bonus.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.offline import open_dataset
from dmrl_ray.algorithms.ppo import PPO
from dmrl_ray.config.components import Number, Sizes
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings
from dmrl_ray.losses.imitation import discriminator_loss, imitation_reward
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import linear, stack
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial

DISCRIMINATOR = "auxiliary.discriminator."


class GAIL(PPO):
    """PPO whose rewards come from a discriminator, which learns beside it."""

    class Config(PPO.Config):
        data: DataSettings
        """The expert's steps. They count as environment steps of the budget, as the policy's."""

        discriminator_hidden_sizes: Sizes = (64, 64)
        """Widths of the discriminator's layers."""

        discriminator_lr: float = Field(default=3e-4, gt=0)
        """Its step size."""

        discriminator_updates: Number = 2
        """Its gradient steps before each update of the policy, on all that was collected."""

    config: Config
    recordable = False
    on_device = False
    _dataset: Dataset | None = None

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        width = math.prod(distribution.observation_space.shape or ())
        policy.auxiliary["discriminator"] = nn.Sequential(
            *stack(
                width + policy.policy_head.num_actions, config.discriminator_hidden_sizes, "tanh"
            ),
            linear(config.discriminator_hidden_sizes[-1], 1, gain=1.0),
        )

    def learning_rate(self, name: str) -> float:
        mine = name.startswith(DISCRIMINATOR)
        return self.config.discriminator_lr if mine else self.config.lr

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """The policy's rollout, and as many steps of the expert."""
        if self._dataset is None:
            self._dataset = open_dataset(self, self.config.data)
        steps, columns = self.config.num_steps, sampler.num_envs
        return [
            *super().collect(sampler, tasks),
            self._dataset.windows(sampler.rng, columns, steps),
        ]

    def with_advantage(self, rollout: Rollout) -> Rollout:
        """With the discriminator's rewards in place of the environment's."""
        with torch.no_grad():
            rollout.reward = imitation_reward(self._logit(rollout.map(torch.from_numpy))).numpy()
        return super().with_advantage(rollout)

    def update(self, trial: Trial) -> dict[str, float]:
        rollout, expert = trial
        for _ in range(self.config.discriminator_updates):
            loss, right = self._judge(expert, rollout)
            self.step_optimizer(loss, (DISCRIMINATOR,))
        return {
            **super().update([rollout]),
            "imitation_reward": float(rollout.reward.mean()),
            "discriminator_loss": float(loss.detach()),
            "discriminator_accuracy": float(right),
        }

    def _judge(self, expert: Rollout, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The discriminator's loss on this learner's columns, and how often it is right."""
        mine = slice(self.rank, None, self.world_size)
        theirs, own = (self._logit(r)[:, mine] for r in (expert, rollout))
        right = 0.5 * ((theirs > 0).float().mean() + (own < 0).float().mean())
        return discriminator_loss(theirs, own), right

    def _logit(self, rollout: Rollout) -> Tensor:
        """(T, B) by which a step is taken for the expert's."""
        obs = self.policy.scale(rollout.obs[:-1]).flatten(2)
        action = self.policy.policy_head.encode(rollout.action)
        logit: Tensor = self.policy.auxiliary["discriminator"](torch.cat([obs, action], -1))
        return logit.squeeze(-1)
