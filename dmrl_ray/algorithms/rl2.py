"""RL^2: a recurrent policy whose memory is the learning algorithm.

Source: Duan et al., "RL^2: Fast Reinforcement Learning via Slow Reinforcement Learning", 2016
(arXiv:1611.02779); the same idea as Wang et al., "Learning to reinforcement learn", 2016
(arXiv:1611.05763). The outer loop is PPO in place of the paper's TRPO.

What makes it RL^2 and not recurrent PPO: one task per trial, memory and returns run through the
episode ends inside a trial, and the policy observes its last action, reward and episode end.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from dmrl_ray.algorithms.actor_critic import updating_norms, with_targets
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.ppo import ClipConfig, ppo_batch, ppo_loss
from dmrl_ray.losses.returns import trial_advantage
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial


class RL2(Algorithm):
    """PPO on whole trials, through which memory and returns run."""

    class Config(ClipConfig):
        lr: float = Field(default=2e-3, gt=0)
        """Step size."""

        gae_lambda: float = Field(
            default=0.3, ge=0, le=1
        )  # Duan et al. 2016; 0.95 does not learn 100-pull bandits
        """0 trusts the value function, 1 the returns."""

    config: Config
    memory_spans_trial = True
    corrects_for_lag = True
    on_device = True
    compiles = True

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """A trial of each task; the memory is reset only at its start (section 2.2)."""
        config = self.config
        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        rollout = sampler.rollout(self.policy)
        return [with_trial_advantage(rollout, gamma=config.gamma, gae_lambda=config.gae_lambda)]

    def update(self, trial: Trial) -> dict[str, float]:
        """PPO's update, in minibatches of whole trials."""
        (rollout,), config = trial, self.config
        loss = partial(ppo_loss, self.policy, clip=config.clip, value_coef=config.value_coef)
        with updating_norms(self, rollout):
            batch = ppo_batch(self.policy, rollout, config.entropy_weight(self.progress))
            return self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)


def with_trial_advantage(rollout: Rollout, *, gamma: float, gae_lambda: float) -> Rollout:
    """The rollout of a whole trial, with advantages across its episodes, and value targets."""
    advantage = trial_advantage(
        torch.as_tensor(rollout.reward),
        torch.as_tensor(rollout.value),
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask=None if rollout.all_count else torch.as_tensor(rollout.mask),
    )
    return with_targets(rollout, advantage)
