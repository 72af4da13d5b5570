"""Proximal policy optimisation, over one task or many at once.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (arXiv:1707.06347),
algorithm 1. With a recurrent encoder this is recurrent PPO: minibatches are whole environments and
memory starts from what the worker had. Left out: the adaptive KL penalty, value clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.actor_critic import (
    ActorCriticConfig,
    refuse_value_memory,
    sequences,
    updating_norms,
    with_targets,
)
from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.config.components import Number
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import pi_and_value
from dmrl_ray.losses.averages import counted_mean, standardized
from dmrl_ray.losses.policy_gradient import ppo_clip_loss, value_loss
from dmrl_ray.losses.returns import generalized_advantage
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


class ClipConfig(ActorCriticConfig):
    """Settings of the clipped update, shared by every algorithm that uses it."""

    epochs: Number = 4
    """Passes over each batch."""

    clip: float = Field(default=0.2, gt=0)  # Schulman et al. 2017, section 6.1
    """Clipping parameter epsilon: half-width of the interval around ratio 1."""


class PPO(Algorithm):
    """Clipped surrogate on advantages that the worker computed once."""

    class Config(ClipConfig):
        num_steps: Number = 128
        """Steps of each environment between updates; episodes continue over updates."""

    config: Config
    continues_episodes = True
    corrects_for_lag = True
    on_device = True
    compiles = True

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        refuse_value_memory(policy)

    @property
    def collected_steps(self) -> int:
        return self.config.num_steps

    def own_adaptation(self) -> Adaptation:
        """Training continues on each task by itself."""
        return continued(self, self.config.gamma)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Algorithm 1, lines 3 and 4: T steps in each environment, and their advantages."""
        config = self.config
        sampler.continue_episodes(tasks, self.policy)
        rollout = sampler.rollout(self.policy, config.num_steps)
        return [with_advantage(rollout, gamma=config.gamma, gae_lambda=config.gae_lambda)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1, lines 6 and 7: K epochs over minibatches of what was collected."""
        (rollout,), config = trial, self.config
        loss = partial(ppo_loss, self.policy, clip=config.clip, value_coef=config.value_coef)
        with updating_norms(self, rollout):
            batch = ppo_batch(self.policy, rollout, config.entropy_weight(self.progress))
            return self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)


def with_advantage(rollout: Rollout, *, gamma: float, gae_lambda: float) -> Rollout:
    """The rollout with its advantages (eq. 11 and 12) and value targets."""
    arrays = (rollout.reward, rollout.value, rollout.next_value)
    masks = (rollout.terminated, rollout.truncated)
    advantage = generalized_advantage(
        *(torch.as_tensor(x) for x in arrays + masks), gamma=gamma, gae_lambda=gae_lambda
    )
    return with_targets(rollout, advantage)


def ppo_batch(policy: ActorCritic, rollout: Rollout, entropy_weight: float) -> Batch:
    """All that `ppo_loss` reads of a rollout; advantages are standardised over the whole of it."""
    return sequences(
        policy,
        rollout,
        action=rollout.action,
        log_prob=rollout.log_prob,
        advantage=standardized(rollout.advantage, None if rollout.all_count else rollout.mask),
        entropy_weight=torch.tensor(entropy_weight, device=rollout.reward.device),
    )


def ppo_loss(
    policy: ActorCritic,
    batch: Batch,
    *,
    clip: float,
    value_coef: float,
    forward: Callable[[ActorCritic, Batch], tuple[Tensor, Tensor]] = pi_and_value,
) -> tuple[Tensor, Report]:
    """The objective of eq. 9, negated: clipped surrogate, value error and entropy bonus.

    Args:
        policy: being trained.
        batch: a minibatch of `ppo_batch`.
        clip: epsilon of eq. 7.
        value_coef: c1 of eq. 9; c2 is the batch's ``entropy_weight``.
        forward: gives distribution parameters and values of the batch.

    Returns:
        The loss, and metrics of the minibatch.
    """
    mask, behaviour_log_prob = batch.get("mask"), batch["log_prob"]
    pi, value = forward(policy, batch)
    log_prob, entropies = policy.policy_head.log_prob_and_entropy(pi, batch["action"])
    policy_loss = ppo_clip_loss(  # L^CLIP, eq. 7
        log_prob, behaviour_log_prob, batch["advantage"], clip=clip, mask=mask
    )
    value_error = value_loss(value, batch["target"], mask=mask)  # L^VF
    entropy = counted_mean(entropies, mask)  # S
    loss = policy_loss + value_coef * value_error - batch["entropy_weight"] * entropy  # eq. 9
    with torch.no_grad():
        log_ratio = log_prob - behaviour_log_prob
        off_one = log_ratio.expm1()  # the ratio, less 1
        approx_kl = counted_mean(off_one - log_ratio, mask)
        clipped = off_one.abs() > clip
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_error,
        "entropy": entropy,
        "approx_kl": approx_kl,
        "clip_fraction": counted_mean(clipped.float(), mask),
    }
