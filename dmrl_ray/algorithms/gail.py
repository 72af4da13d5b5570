"""Generative adversarial imitation: PPO on how much its steps look like an expert's.

Source: Ho and Ermon, "Generative Adversarial Imitation Learning", 2016 (arXiv:1606.03476),
algorithm 1, with PPO in place of TRPO. The discriminator is among the policy's networks, so that
workers compute its reward; the episodes table keeps the environment's own returns.
Left out: the causal entropy term beyond PPO's entropy bonus.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.offline import open_dataset
from dmrl_ray.algorithms.ppo import PPO, with_advantage
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
        """Algorithm 1, line 3: the policy's steps, and as many of the expert's.

        The policy's have the discriminator's rewards in place of the environment's.
        """
        config = self.config
        if self._dataset is None:
            self._dataset = open_dataset(self, config.data)
        sampler.continue_episodes(tasks, self.policy)
        rollout = sampler.rollout(self.policy, config.num_steps)
        with torch.no_grad():
            rollout.reward = imitation_reward(self._logit(rollout.map(torch.from_numpy))).numpy()
        rollout = with_advantage(rollout, gamma=config.gamma, gae_lambda=config.gae_lambda)
        return [rollout, self._dataset.windows(sampler.rng, sampler.num_envs, config.num_steps)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1, lines 4 and 5: the discriminator's steps (eq. 17), then the policy's."""
        rollout, expert = trial
        for _ in range(self.config.discriminator_updates):
            loss, accuracy = self._discriminate(expert, rollout)
            self.step_optimizer(loss, (DISCRIMINATOR,))
        return {
            **super().update([rollout]),
            "imitation_reward": float(rollout.reward.mean()),
            "discriminator_loss": float(loss.detach()),
            "discriminator_accuracy": float(accuracy),
        }

    def _discriminate(self, expert: Rollout, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The discriminator's loss on this learner's environments, and how often it is right."""
        mine = slice(self.rank, None, self.world_size)
        theirs, own = (self._logit(r)[:, mine] for r in (expert, rollout))
        accuracy = 0.5 * ((theirs > 0).float().mean() + (own < 0).float().mean())
        return discriminator_loss(theirs, own), accuracy

    def _logit(self, rollout: Rollout) -> Tensor:
        """(T, B) log-odds that a step is the expert's."""
        obs = self.policy.scale(rollout.obs[:-1]).flatten(2)
        action = self.policy.policy_head.encode(rollout.action)
        logit: Tensor = self.policy.auxiliary["discriminator"](torch.cat([obs, action], -1))
        return logit.squeeze(-1)
