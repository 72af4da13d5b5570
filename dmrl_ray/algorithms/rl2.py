"""RL^2: a recurrent policy whose memory is the learning algorithm.

Source: Duan et al., "RL^2: Fast Reinforcement Learning via Slow Reinforcement Learning", 2016
(arXiv:1611.02779); the same idea as Wang et al., "Learning to reinforcement learn", 2016
(arXiv:1611.05763). The outer loop is PPO in place of the paper's TRPO.

What makes it RL^2 and not recurrent PPO: one task per trial, memory and returns run through the
episode ends inside a trial, and the policy sees its last action, reward and episode end.
"""

from __future__ import annotations

import torch
from pydantic import Field

from dmrl_ray.algorithms.ppo import PPO, ClipConfig
from dmrl_ray.backend import as_kind_of
from dmrl_ray.losses.returns import trial_advantage
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial


class RL2(PPO):
    """PPO on whole trials."""

    class Config(ClipConfig):
        lr: float = Field(default=2e-3, gt=0)
        """Step size."""

        gae_lambda: float = Field(default=0.3, ge=0, le=1)  # 0.95 does not learn 100-pull bandits
        """0 trusts the value function, 1 the returns."""

    sees_previous = True
    memory_spans_trial = True
    continues_episodes = False

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        return [self.with_advantage(sampler.rollout(self.policy))]

    def with_advantage(self, rollout: Rollout) -> Rollout:
        """The rollout of a whole trial, with its advantages and value targets."""
        advantage = trial_advantage(
            torch.as_tensor(rollout.reward),
            torch.as_tensor(rollout.value),
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            mask=None if rollout.all_count else torch.as_tensor(rollout.mask),
        )
        rollout.advantage = as_kind_of(rollout.value, advantage)
        rollout.value_target = rollout.advantage + rollout.value
        return rollout
